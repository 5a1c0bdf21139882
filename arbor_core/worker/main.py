"""The inside of a job's process: `python -m arbor_core.worker.main <attempt dir>`, or a fork of the fork server.

Heavy libraries are imported here and nowhere else, by importing the trainer's function.
"""

from __future__ import annotations

import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from arbor_core.jobdir.documents import import_object, read_document
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.process.cpu import instruction_set
from arbor_core.process.exit import ignore_output_errors, run_and_exit
from arbor_core.process.prctl import PR_SET_PDEATHSIG, prctl
from arbor_core.types import InputKind, JobFailed, JobStopped, PausedEvent

from .command_run import CommandWorkerRun
from .failures import explain, fail
from .file_run import FileWorkerRun
from .rollout_run import RolloutWorkerRun
from .run import WorkerRun, open_run

KINDS: dict[InputKind, type[WorkerRun[Any]]] = {
    "file": FileWorkerRun,
    "rollouts": RolloutWorkerRun,
    "commands": CommandWorkerRun,
}


def main(attempt_dir: Path) -> int:
    """Run the trainer; returns the exit status. How the job ended is in its events."""
    kind = KINDS[read_document(AttemptDir(attempt_dir).job).learns_from]
    run = open_run(attempt_dir, kind)
    if run.world_size > 1:  # a child of torchrun: a supervisor that is killed takes only torchrun along
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    warn_of_another_machine(run)
    try:
        import_object(run.order.entry)(run)
    except JobStopped as stop:
        if stop.desired == "pause":
            run.emit(PausedEvent("The job is paused", code=None))
        return 0
    except JobFailed as error:
        fail(run, str(error), error.code, error.param)
        return 1
    except Exception as error:
        traceback.print_exc()  # into worker.log
        return explain(run, error)
    finally:
        if run.rank == 0:  # it may still take what another rank, which has ended, wrote there
            shutil.rmtree(run.work, ignore_errors=True)
    return 0


def warn_of_another_machine(run: WorkerRun[Any]) -> None:
    """Say that the numbers may come out otherwise than on the machine that the job was made on."""
    before, here = run.document.cpu, instruction_set()
    if before and before != here:
        text = f"This job was made on a processor with {before}; this one computes with {here}: last digits may differ"
        run.message(text, "warn", made=before, here=here)


def begin() -> None:
    """`python -m arbor_core.worker.main <attempt dir>`."""
    ignore_output_errors()
    run_and_exit(lambda: main(Path(sys.argv[1]).absolute()))


if __name__ == "__main__":
    begin()
