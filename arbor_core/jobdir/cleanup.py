"""What processes that were killed leave in a job's directory: half-written files, checkpoints nobody has told of,
and children that outlived their supervisor."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from arbor_core.crash_points import crash_point
from arbor_core.storage.atomic import remove_temporary
from arbor_core.storage.event_log import tail
from arbor_core.types import CheckpointDiscarded, CheckpointEvent, CheckpointWithdrawn

from . import checkpoints
from .layout import CHECKPOINT_REQUESTS, CHECKPOINTS, LEDGER, WEIGHTS, AttemptDir, JobDir

log = logging.getLogger(__name__)
LIVE = (WEIGHTS, LEDGER, CHECKPOINT_REQUESTS)
"""Folders of a job's directory that nobody needs after its end."""
ROOMS = (".", CHECKPOINTS, "resume", f"{CHECKPOINTS}/{checkpoints.NAMED}", WEIGHTS, CHECKPOINT_REQUESTS)
"""Folders of a job's directory, beside those of its attempts, in which files and directories are replaced."""


def sweep(job: JobDir) -> None:
    """Remove what was not finished (`storage/atomic.py` has the rule). To be called when an attempt has ended, and
    before the job ends in whatever way: no process of it may live, and nobody else may be writing there."""
    attempts = job.attempts()
    for folder in (*(job.path / name for name in ROOMS), *(attempt.path for attempt in attempts)):
        remove_temporary(folder)
    job.inbox_bell.unlink(missing_ok=True)
    for attempt in attempts:
        shutil.rmtree(attempt.work, ignore_errors=True)
        for draft in attempt.path.glob(".keeper.*"):  # of a version that gave it another name
            draft.unlink(missing_ok=True)


def forget_rollouts(job: JobDir) -> None:
    """Remove what only served while the job learned: policies, completions, and requests that nobody can answer any
    more. Its inbox stays: `arbor replay` repeats the training from it."""
    for name in LIVE:
        shutil.rmtree(job.path / name, ignore_errors=True)
        crash_point(f"forgotten.{name}")


def reconciled(attempt: AttemptDir) -> list[CheckpointEvent | CheckpointWithdrawn]:
    """The events that an attempt could not write any more: its checkpoints that were not reported, and withdrawals of
    any that are not whole, as far as can be seen without reading them. What it had reported as discarded is removed."""
    folder = attempt.job.checkpoints
    known: set[str] = set()
    for _, event in tail(attempt.events):
        if isinstance(event, CheckpointEvent | CheckpointDiscarded):
            known.add(event.dir)
        if isinstance(event, CheckpointDiscarded):
            shutil.rmtree(folder / event.dir, ignore_errors=True)
    found: list[CheckpointEvent | CheckpointWithdrawn] = []
    for path in reversed(checkpoints.newest_first(folder)):
        said = checkpoints.manifest(path)
        if reason := checkpoints.fault(path, sizes_only=True):
            found.append(checkpoints.withdrawal(path, reason))
        elif said and said.attempt == attempt.number and path.name not in known:
            found.append(created(path, said))
    return found


def created(folder: Path, said: checkpoints.Manifest) -> CheckpointEvent:
    """The event of a checkpoint that nobody has told of."""
    return CheckpointEvent(
        f"Checkpoint created at step {said.step}",
        step=said.step,
        dir=folder.name,
        metrics=said.metrics,
        at=(folder / checkpoints.MANIFEST).stat().st_mtime,
    )
