"""What a machine runs short of and may have again later: room on a disk, descriptors, processes, memory.

Waiting for room, and knowing such a shortage from other faults.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
SCARCE = {
    errno.EMFILE: "this server may open no more files (ulimit -n)",
    errno.ENFILE: "this machine may open no more files (sysctl fs.file-max)",
    errno.EAGAIN: "no more processes may be started (ulimit -u, or the pids limit of a container)",
    errno.ENOMEM: "there is not enough memory",
}
"""What a process that is started may lack, and where it is limited."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds between two looks: twice as long each time."""
LITTLE = 1 << 16
"""A disk with fewer free bytes is full."""


class RoomError(OSError):
    """There is not enough room."""


def wait_for_room(folder: Path, needed: int, seconds: float, meanwhile: Callable[[], None]) -> None:
    """Wait until `needed` bytes are free; `meanwhile` is called before each wait.

    Raises:
        RoomError: they still are not after `seconds`.
    """
    pause, until = FIRST_WAIT, time.monotonic() + seconds
    while (free := shutil.disk_usage(folder).free) < needed:
        left = until - time.monotonic()
        if left <= 0:
            raise RoomError(errno.ENOSPC, f"{free} bytes are free, about {needed} are needed", str(folder))
        meanwhile()
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_WAIT)


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether a full disk is behind an error. Libraries in other languages say so in words only, or not at all."""
    seen: BaseException | None = error
    while seen is not None:
        said = str(seen).lower()
        if (isinstance(seen, OSError) and seen.errno in FULL) or "no space left" in said or "quota exceeded" in said:
            return True
        seen = seen.__cause__ or seen.__context__
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(folder).free < LITTLE


def shortage(error: OSError) -> str | None:
    """What the machine is short of, other than room on a disk, if that is behind an error."""
    return SCARCE.get(error.errno or 0)
