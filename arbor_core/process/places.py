"""Processes that belong to a directory, and are found again there and nowhere else.

A storage directory can be copied while its processes live. The copy holds their refs too, and whoever works on it must
neither take these processes for its own nor end them. So the ref of a process that belongs to a directory names the
directory too, by what a move keeps and a copy does not have: its inode. And the process locks the directory as long as
it lives: that shows in every process namespace, which a pid does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from .lifecycle import lives, process_ref


def place_ref(pid: int, folder: Path) -> str:
    """`pid:start time:boot id:device-inode` of a process that belongs to a directory; empty if there is no such
    process.

    Raises:
        OSError: it could not be looked up, or the directory is gone.
    """
    ref = process_ref(pid)
    return f"{ref}:{_identity(folder)}" if ref else ""


def belongs(ref: str, folder: Path) -> bool:
    """Whether a ref was made for this directory, and not for the one that this is a copy of. Refs of earlier versions
    name none; a directory that is gone is no copy.

    Raises:
        OSError: it could not be looked up.
    """
    identity = ref.split(":")[3:]
    try:
        return not identity or identity == [_identity(folder)]
    except FileNotFoundError:
        return True


def lives_in(ref: str, folder: Path) -> bool:
    """Whether a process lives that belongs to this directory and can be seen from here.

    Raises:
        OSError: it could not be looked up.
    """
    return belongs(ref, folder) and lives(ref)


def hold(folder: Path) -> int:
    """Lock a directory until this process has ended; returns a descriptor, which a child that shall not hold it must
    close.

    Raises:
        OSError: there is no such directory.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def is_held(folder: Path) -> bool:
    """Whether a process holds a directory, of whatever namespace."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def moved_to(handle: int) -> Path | None:
    """Where a directory that is held is now; None: it is nowhere any more, or that is not known here."""
    with contextlib.suppress(OSError):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if os.path.samestat(path.stat(), os.fstat(handle)):
            return path
    return None


def _identity(folder: Path) -> str:
    found = folder.stat()
    return f"{found.st_dev:x}-{found.st_ino:x}"
