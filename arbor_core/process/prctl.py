"""Linux's prctl: a process that is to die with its parent, or to adopt its descendants."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    """Linux's prctl; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent(pipe: int) -> None:
    """Have this process killed when its parent ends. The kernel says nothing of a parent that ended before it was
    asked, while an interpreter started; the pipe does.

    Args:
        pipe: A descriptor, standard input or output say, whose other end the parent alone holds.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    hung_up = select.poll()
    hung_up.register(pipe, 0)  # POLLHUP and POLLERR are reported whatever is asked for
    if hung_up.poll(0):
        os.kill(os.getpid(), signal.SIGKILL)
