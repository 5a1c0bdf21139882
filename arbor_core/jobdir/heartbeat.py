"""The heartbeat of an attempt: its worker touches a file when training makes progress, its server watches the file.

The first beat comes with the first step, or when the trainer is ready and waits for rollouts: importing and loading
have a time of their own.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

HEARTBEAT = "heartbeat"
"""The file, in the attempt's directory."""
BEAT_SECONDS = 1.0
"""The file is touched at most so often."""


class Pulse:
    """The worker's end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = float("-inf")

    def go_on(self) -> None:
        """Beat, if the first step has been made."""
        if self.last > 0:
            self.beat()

    def beat(self) -> None:
        """Say that there is progress."""
        now = time.monotonic()
        if now - self.last >= BEAT_SECONDS:
            self.last = now
            with contextlib.suppress(OSError):  # a full disk must not end training
                self.path.touch()


class Watch:
    """The server's end. It counts looks and compares no clocks: a clock that is set ends nobody, and after this server
    or the machine stood still a trainer has missed one look, however long that was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beat: int | None = None
        self.missed = 0
        """Looks in a row that found no new beat."""

    @property
    def begun(self) -> bool:
        """Whether a beat was seen."""
        return self.beat is not None

    def look(self) -> None:
        """Look whether the heartbeat has moved."""
        try:
            beat = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            beat = None
        self.missed = self.missed + 1 if beat == self.beat else 0
        self.beat = beat
