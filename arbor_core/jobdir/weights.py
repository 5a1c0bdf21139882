"""`weights/<version>-<attempt>/` of a job's directory: policies for engines."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arbor_core.crash_points import crash_point
from arbor_core.storage.atomic import TEMPORARY

KEPT = 4
"""Published versions that stay on the disk, beside those that somebody reads."""


@contextmanager
def publishing(folder: Path, name: str) -> Iterator[Path]:
    """Yield a directory to write a version into; it is `folder/name` when the block ends. Older ones go.

    Not synced: after a power failure the trainer publishes again from its checkpoint.
    """
    temporary = folder / f"{name}{TEMPORARY}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        crash_point("weights.written")
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        crash_point("weights.renamed")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(folder.iterdir(), key=_newness, reverse=True)[KEPT:]:
        _remove_unread(old)


def _newness(path: Path) -> tuple[int, int]:
    """Version and attempt. The newest version is served, though an attempt that began before it publishes again."""
    version, _, attempt = path.name.removesuffix(TEMPORARY).partition("-")
    return int(version), int(attempt)


@contextmanager
def reading(folder: Path) -> Iterator[bool]:
    """Whether a version is on the disk; while the block lasts, its trainer does not remove it."""
    with _locked(folder, fcntl.LOCK_SH) as locked:
        yield locked


def _remove_unread(folder: Path) -> None:
    """Remove a version, unless somebody reads it: then it goes with a later one."""
    with _locked(folder, fcntl.LOCK_EX) as locked:
        if locked:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[bool]:
    """Hold a lock on a directory, which ends with the process that holds it; False: it has gone, or is locked."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        yield _lock(opened, kind) and _is_still(folder, opened)
    finally:
        os.close(opened)


def _lock(opened: int, kind: int) -> bool:
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(folder: Path, opened: int) -> bool:
    """Whether a path still names the directory that was opened there: it may have been removed before it was locked."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False
