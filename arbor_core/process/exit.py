"""How a process that does a job's work ends."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


def leave(work: Callable[[], int]) -> NoReturn:
    """Do the work as the last thing that this process does; it returns the exit status. The process ends at once then:
    threads that libraries have left running abort an interpreter that goes its usual way."""
    status = 1
    try:
        status = work()
    except SystemExit as stop:
        status = exit_status(stop)
    except BaseException:
        traceback.print_exc()  # into worker.log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(stop: SystemExit) -> int:
    """What an interpreter that goes its usual way would make of it."""
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


class _Lossy(io.FileIO):
    """A file whose writes never fail."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def print_anyway() -> None:
    """Let what this process prints be lost when it cannot be written, instead of ending what it does."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        getattr(sys, name).flush()
        raw = io.BufferedWriter(_Lossy(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, errors="backslashreplace", line_buffering=True))
