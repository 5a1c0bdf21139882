"""What a machine may run short of for a while: disk space, file descriptors, processes, memory.

How such a shortage is told from other errors, and how to wait for disk space.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
SHORTAGES = {
    errno.EMFILE: "this server may open no more files (ulimit -n)",
    errno.ENFILE: "this machine may open no more files (sysctl fs.file-max)",
    errno.EAGAIN: "no more processes may be started (ulimit -u, or the pids limit of a container)",
    errno.ENOMEM: "there is not enough memory",
}
"""What may be missing when a process is started, and where it is limited."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 8.0
"""Between two attempts; each wait is twice as long as the one before."""
MIN_FREE_BYTES = 1 << 16
"""A disk with less free space is full."""


class DiskFullError(OSError):
    """There is not enough disk space."""


class StorageLostError(OSError):
    """The storage directory has been out of reach for too long: it is gone, or cannot be written."""


def wait_for_disk_space(folder: Path, needed: int, seconds: float, before_wait: Callable[[], None]) -> None:
    """Wait until `needed` bytes are free on the disk of `folder`; `before_wait` is called before each wait.

    Raises:
        DiskFullError: they still are not after `seconds`.
    """
    pause, deadline = FIRST_WAIT_SECONDS, time.monotonic() + seconds
    while (free := shutil.disk_usage(folder).free) < needed:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DiskFullError(errno.ENOSPC, f"{free} bytes are free, about {needed} are needed", str(folder))
        before_wait()
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_WAIT_SECONDS)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a full disk caused an error. Libraries in other languages say so in words only, or not at all: then an
    OSError or RuntimeError counts if the disk of `folder` is full now."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, OSError) and cause.errno in DISK_FULL_ERRNOS:
            return True
        if "no space left" in text or "quota exceeded" in text:
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(folder).free < MIN_FREE_BYTES


def resource_shortage(error: OSError) -> str | None:
    """What the machine is short of, other than disk space, if that caused the error."""
    return SHORTAGES.get(error.errno or 0)


def public_text(error: Exception, root: Path) -> str:
    """What clients may read of an error: no path of this machine, but for those below the storage directory `root`,
    which are relative to it. The log has all of it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and not str(error.filename or root).startswith(f"{root}/"):
        text = f"[Errno {error.errno}] {error.strerror}"
    return text.replace(f"{root}/", "").replace(str(root), "the storage directory")
