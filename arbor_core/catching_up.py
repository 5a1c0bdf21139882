"""What an attempt has to do again before its job may finish."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from . import inbox


class CatchingUp:
    """The groups of rollouts that earlier attempts have handled. What came of them was told to clients; an attempt that
    begins where the last checkpoint is makes it again, and nothing beyond it.

    Args:
        folder: The inbox.
        count: How many there are, from the first on.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.done = count == 0

    @cached_property
    def end(self) -> int:
        """The position after the last of them."""
        return inbox.end_of(self.folder, self.count)

    def handled(self, count: int) -> None:
        """So many have been handled by now."""
        self.done = self.done or count >= self.count
