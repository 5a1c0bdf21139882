"""The heartbeat of an attempt: its worker touches a file when training makes progress, its server monitors the file.

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


class HeartbeatMonitor:
    """The server's end. It counts checks and compares no clocks: a clock that is set ends no attempt, and after this
    server or the machine stood still a trainer has missed one check, however long that was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beat: int | None = None
        """The file's modification time in nanoseconds at the last check; None before the first beat."""
        self.missed = 0
        """Checks in a row that saw no new beat."""

    @property
    def started(self) -> bool:
        """Whether a beat was seen."""
        return self.beat is not None

    def check(self) -> None:
        """Check whether there was a beat since the last check."""
        try:
            beat = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            beat = None
        self.missed = self.missed + 1 if beat == self.beat else 0
        self.beat = beat
