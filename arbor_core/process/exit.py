"""How a process that works for a job ends, and that what it prints cannot end it."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


def run_and_exit(work: Callable[[], int]) -> NoReturn:
    """Run `work` as the last thing of this process, and exit at once with the status that it returns.

    The interpreter is not finalised: threads that libraries left running abort one that is.
    """
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
    """The exit status that the interpreter derives from a `SystemExit`; a text is printed and means 1."""
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


class _LossyFile(io.FileIO):
    """A file whose writes never fail; what cannot be written is lost."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def ignore_output_errors() -> None:
    """Drop what this process prints when it cannot be written (a full disk), instead of failing."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        getattr(sys, name).flush()
        raw = io.BufferedWriter(_LossyFile(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, errors="backslashreplace", line_buffering=True))
