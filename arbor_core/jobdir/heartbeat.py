"""The heartbeat of an attempt: its worker touches a file when training makes progress, its executor looks at the file.

The first beat comes with the first step, or when the trainer is ready and waits for rollouts: importing and loading
have a time limit of their own.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

BEAT_SECONDS = 1.0
"""The least time between two touches of the file."""


class Heartbeat:
    """The worker's end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = float("-inf")
        """When the file was touched (`time.monotonic`)."""

    def beat(self) -> None:
        """Report progress."""
        now = time.monotonic()
        if now - self.last >= BEAT_SECONDS:
            self.last = now
            with contextlib.suppress(OSError):  # a full disk must not end training
                self.path.touch()

    def beat_if_started(self) -> None:
        """Report progress, unless the first step is still to come."""
        if self.last > 0:
            self.beat()


def last_beat(path: Path) -> str | None:
    """A text that is another after every beat; None before the first, and while the file cannot be seen."""
    try:
        return str(path.stat().st_mtime_ns)
    except OSError:
        return None
