"""`arbor replay JOB`: run a job's trainer again over its directory, and see whether every step comes out the same.

Everything that a step depends on is in the job's directory: the configuration, the seed, the training file or the
inbox, the numbers of threads. Each step's loss and digest of the parameters are compared with what the newest attempt
that made this step had reported. On CPUs they are equal; the first step where they are not is named. The job itself is
left as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from arbor_core.jobdir import groups, inbox
from arbor_core.jobdir.documents import object_path, read_document, read_order, read_placement, write_order
from arbor_core.jobdir.layout import JobDir
from arbor_core.plugins import Plugins, load
from arbor_core.process.environment import clean_env, threads_env
from arbor_core.storage.atomic import replace
from arbor_core.storage.event_log import tail
from arbor_core.types import ArborError, AttemptOrder, ErrorEvent, MetricsEvent, StepInputs, rollouts

from .launchers import ConfiguredLauncher

POLL_SECONDS = 0.05
END_SECONDS = 30.0


class Step(msgspec.Struct, frozen=True):
    """What a step left behind."""

    number: int
    loss: float | None
    digest: str | None
    fed: StepInputs | None


def replay(job_dir: Path, tell: Callable[[str], object], models: Sequence[Path] = ()) -> None:
    """Repeat a job's steps.

    Args:
        job_dir: Its directory, of a job that is not running.
        tell: Called with each line that its user may like to read.
        models: Folders in which to look for the base model where it is no longer at the place that the last attempt
            found it at.

    Raises:
        ArborError: there is nothing to repeat, a record of the inbox is not the one that was trained, or a step came
            out otherwise; the message says which.
    """
    steps = reported(job_dir)
    if not steps:
        raise ArborError(f"{job_dir} has no step to repeat: no attempt of the job has reported one")
    check_inbox(job_dir, steps)
    tell(f"Repeating {len(steps)} steps of {job_dir.name}")
    compared = digests = 0
    with scratch(job_dir, models) as folder, training(folder) as process:
        for step in repeated(folder, process):
            before = steps.get(step.number)
            if before is None:  # of an attempt that died before it could report it
                continue
            if (before.loss, before.digest) != (step.loss, step.digest):
                raise ArborError(difference(before, step))
            compared += 1
            digests += step.digest is not None
            if step.number == max(steps):
                break
        else:
            raise ArborError(f"only {compared} of {len(steps)} steps were made again:\n{worker_log(folder)}")
    told = f"and the digests of the parameters after {digests} of them" if digests else "(no digests were reported)"
    tell(f"{compared} steps repeated: all losses are equal {told}")


def reported(job_dir: Path) -> dict[int, Step]:
    """Each step as the newest attempt that made it reported it."""
    found = {}
    for attempt in JobDir(job_dir).attempts():
        for step in steps_of(attempt.events):
            found[step.number] = step
    return found


def steps_of(log: Path, offset: int = 0) -> Iterator[Step]:
    for _, event in tail(log, offset):
        if isinstance(event, MetricsEvent):
            yield step_of(event)


def step_of(event: MetricsEvent) -> Step:
    return Step(event.step, event.values.get("train_loss"), event.digest, event.fed)


def check_inbox(job_dir: Path, steps: dict[int, Step]) -> None:
    """See whether the groups are those that were trained on.

    Raises:
        ArborError: naming the first record that is another one, and the step that it belonged to.
    """
    trained = {position: (crc, n) for n, step in steps.items() if step.fed for position, crc in step.fed.groups}
    if not trained:
        return
    for record in whole(JobDir(job_dir).inbox, trained):
        crc, number = trained.pop(record.start, (record.crc, 0))
        if crc != record.crc:
            raise ArborError(
                f"the group at position {record.start} of the inbox (batch {record.group.id}) is not the one that step "
                f"{number} was trained on: its checksum was {crc:08x} and is {record.crc:08x}"
            )
    if trained:
        position, (_, number) = min(trained.items())
        raise ArborError(f"the inbox has no group at position {position}, on which step {number} was trained")


def whole(folder: Path, trained: dict[int, tuple[int, int]]) -> Iterator[rollouts.Record]:
    """The inbox's records.

    Raises:
        ArborError: one is not what was written; names the step that it belongs to.
    """
    try:
        yield from groups.read(folder, 0)
    except inbox.InboxDamagedError as error:
        _, number = trained.get(error.position, (0, 0))
        step = f"step {number} was trained on it" if number else "no step was trained on it"
        raise ArborError(f"{error} ({step})") from None


@contextlib.contextmanager
def scratch(job_dir: Path, models: Sequence[Path]) -> Iterator[Path]:
    """A directory of the same job before its first attempt; the inbox's segments are the job's own files."""
    job, last = JobDir(job_dir), JobDir(job_dir).attempts()[-1]
    document, before = read_document(job), read_order(last)
    if before.base and not document.model:
        before = msgspec.structs.replace(before, base=base_model(before.base, document.model_name, models))
    plugins = load()
    trainer = plugins.get("trainers", document.trainer)
    with tempfile.TemporaryDirectory(prefix="replay-", dir=job_dir.parent) as name:
        folder = JobDir(Path(name))  # beside the job's own, because stored paths are relative to the storage directory
        attempt = folder.attempt(1)
        attempt.path.mkdir(parents=True)
        shutil.copy(job.document, folder.document)
        replace(folder.desired, b"run", durable=False)
        folder.inbox.mkdir()
        for _, path in inbox.segments(job.inbox):
            os.link(path, folder.inbox / path.name)
        placement = read_placement(last)
        order = AttemptOrder(
            dir=attempt.path,
            argv=(),
            env=before.env,
            python=trainer.python or sys.executable,
            entry=trainer.entry,
            config_type=object_path(trainer.config),
            base=before.base,
        )
        if before.argv:
            order = ranks_launcher(plugins).order(order, len(placement.devices))
        write_order(order, placement)
        yield folder.path


def ranks_launcher(plugins: Plugins) -> ConfiguredLauncher:
    """What starts the ranks here: the same computation, whoever started them before."""
    from arbor_core.config.compose import defaults  # Hydra, which a job on one device does without

    return ConfiguredLauncher.of(plugins, defaults("launcher", "torchrun"))


def base_model(found: str, name: str, models: Sequence[Path]) -> str:
    """Where a base model is that the last attempt found at `found`.

    Raises:
        ArborError: it is not there any more, and in none of the folders.
    """
    if not Path(found).is_absolute() or Path(found).exists():  # a hub id
        return found
    for folder in models:
        if (folder / name).is_dir():
            return str((folder / name).absolute())
    raise ArborError(f"the base model '{name}' is not at {found} any more: say in which folder it is with --models DIR")


@contextlib.contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer at work in a process of its own, which is gone afterwards."""
    attempt = JobDir(folder).attempt(1)
    order, document = read_order(attempt), read_document(attempt.job)
    command = list(order.argv) or [order.python, "-m", "arbor_core.worker.main", "."]
    env = {**clean_env(), **order.env, **threads_env(document.threads), "PYTHONHASHSEED": "0"}
    with attempt.log.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=attempt.path, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_SECONDS)


def repeated(folder: Path, process: subprocess.Popen[bytes]) -> Iterator[Step]:
    """The steps as they are made again, until the process ends."""
    log, offset = JobDir(folder).attempt(1).events, 0
    while True:
        ended = process.poll() is not None  # before the events: what was written before its end is then all there
        for offset, event in tail(log, offset):  # noqa: B020, B007
            if isinstance(event, ErrorEvent):
                raise ArborError(f"the trainer failed: {event.message}")
            if isinstance(event, MetricsEvent):
                yield step_of(event)
        if ended:
            return
        time.sleep(POLL_SECONDS)


def difference(before: Step, now: Step) -> str:
    """How a step came out otherwise."""
    what = f"its loss was {before.loss} and is {now.loss}"
    if before.loss == now.loss:
        what = f"its loss is equal ({now.loss}), its parameters are not: digest {before.digest}, now {now.digest}"
    taken = f"; it took {len(before.fed.groups)} groups up to position {before.fed.end}" if before.fed else ""
    return f"step {before.number} came out otherwise: {what}{taken}"


def worker_log(folder: Path) -> str:
    return JobDir(folder).attempt(1).log.read_text(errors="replace")[-2000:]


def find_job(job: str, storage: Path) -> Path:
    """A job's directory, from its id or its path.

    Raises:
        ArborError: there is none.
    """
    for folder in (JobDir.of(storage, job), JobDir(Path(job))):
        if folder.document.is_file():
            return folder.path.resolve()
    raise ArborError(f"there is no job '{job}' in {storage}: give its id and --storage DIR, or its directory")
