"""Files that appear as a whole, and the one rule for those that are not whole yet.

Whatever is still being written has a name that ends in `.tmp`, and lies beside what it becomes (an upload: in
`files/.incoming`). Who writes it removes it when that fails. Who is killed cannot; so where a process may have died,
the owner of the folder calls `remove_temporary` as soon as nobody can be writing there:

- a job's directory: when an attempt has ended, and before the job ends in whatever way (`jobdir/cleanup.py`);
- `files`, `engines` and `run`, into which only a server and its own processes write: when the next server starts.

`arbor_core.testing.invariants` finds what is left over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from arbor_core.crash_points import crash_point

TEMPORARY = ".tmp"
"""How the name of a file or directory ends that is not whole yet."""
_in_hand: set[str] = set()
"""Names of temporary files that threads of this process are writing."""


def replace(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        durable: Wait until it is on the disk, so that this holds after a power failure too.

    Raises:
        OSError: the disk is full, for example; the old content is still there, and nothing else.
    """
    _put(path, lambda temporary: _write(temporary, content, durable=durable), os.replace)
    if durable:
        sync_folder(path.parent)


def create(path: Path, content: bytes) -> bool:
    """Make a file with its content, unless there is one; whether it was made. Of several callers one succeeds."""
    if path.exists():
        return False
    try:
        _put(path, lambda temporary: _write(temporary, content, durable=False), os.link)  # fails where there is one
    except FileExistsError:
        return False
    return True


def replace_link(path: Path, target: Path) -> None:
    """Make a symbolic link, in the place of another if there is one."""

    def link(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)

    _put(path, link, os.replace)


def remove_temporary(folder: Path) -> None:
    """Remove what processes that were killed left directly in a folder. No other process may be writing there."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            if entry.name in _in_hand:
                continue
            if entry.name.endswith(TEMPORARY) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name.endswith(TEMPORARY):
                Path(entry.path).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new, renamed and removed entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(path: Path, write: Callable[[Path], None], move: Callable[[Path, Path], None]) -> None:
    """Write a temporary file, then move it to its place. Its name is this thread's own: no other process has one with
    this number, and a thread writes one file at a time."""
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}{TEMPORARY}")
    _in_hand.add(temporary.name)
    try:
        write(temporary)
        crash_point("file.written")
        move(temporary, path)
        crash_point("file.renamed")
    finally:
        with contextlib.suppress(OSError):  # it has moved, or the first error says more
            temporary.unlink()
        _in_hand.discard(temporary.name)


def _write(path: Path, content: bytes, *, durable: bool) -> None:
    with path.open("wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
