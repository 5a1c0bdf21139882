"""Resume points: checkpoints that only a job's next attempt goes on from. They are not offered as models, the newest
alone is kept, and it goes when a checkpoint of its step or a later one is there, or the job has ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from arbor_core.crash_points import crash_point
from arbor_core.types import Checkpoint

from . import checkpoints


def write(folder: Path, step: int, attempt: int, metrics: dict[str, float], fill: Callable[[Path], None]) -> None:
    """Write a resume point under `folder` in place of the one before.

    Args:
        fill: Writes into the directory that it is given.

    Raises:
        DiskFullError: there was no room for it; the one before is still there.
    """
    name = f"{step}-{attempt}"
    with checkpoints.writing(folder / name, step, attempt, metrics) as temporary:
        fill(temporary)
    crash_point("resume_point.renamed")
    for path in checkpoints.newest_first(folder):
        if path.name != name:
            shutil.rmtree(path)


def newest(folder: Path) -> Checkpoint | None:
    """The newest one that is whole. A damaged one is worth nothing to anybody, and is passed over."""
    found, _ = checkpoints.newest_whole(folder)
    return Checkpoint(found.step, found.dir, found.metrics, resume_only=True) if found else None


def forget(folder: Path, up_to: int | None = None) -> None:
    """Remove those up to a step; None: all."""
    if up_to is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in checkpoints.newest_first(folder):
        if int(path.name.partition("-")[0]) <= up_to:
            shutil.rmtree(path, ignore_errors=True)
