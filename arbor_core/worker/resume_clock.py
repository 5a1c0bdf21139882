"""When a trainer writes its next resume point."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

WRITING_SHARE = 0.02
"""Most of the time of a job that resume points may take."""


class ResumeClock:
    """When the next resume point is due.

    Args:
        seconds: At least so long after the one before, or after a checkpoint; 0: always; None: never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.written_at, self.took = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Whether one is to be written now. Ranks may disagree: one of them decides."""
        if not self.seconds:
            return self.seconds is not None
        return time.monotonic() - self.written_at >= max(self.seconds, self.took / WRITING_SHARE)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A checkpoint or a resume point is written while the block runs."""
        began = time.monotonic()
        yield
        self.written_at = time.monotonic()
        self.took = self.written_at - began
