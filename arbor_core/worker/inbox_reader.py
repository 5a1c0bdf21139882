"""A worker's side of learning from rollouts: groups that arrive, weights that go out, checkpoints that clients name.

Everything goes through the job's directory: `inbox/` (see `inbox`), `weights/<version>-<attempt>/`, and
`asked/<name>.json` for each checkpoint that a client waits for.
"""

from __future__ import annotations

import select
import socket
from functools import cached_property
from pathlib import Path

from arbor_core.jobdir import inbox
from arbor_core.process.wakeup import short_address
from arbor_core.types import rollouts


class Feed:
    """The reading end of a job's inbox, and a socket that wakes it when something was appended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bell = folder, folder / "bell"
        folder.mkdir(parents=True, exist_ok=True)
        self.bell.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with short_address(self.bell) as address:
            self.socket.bind(address)

    def take(self, position: int, wait: float, until: int | None = None) -> list[rollouts.Record]:
        """The records from a position on, and before `until`; waits up to `wait` seconds for the first, or until
        it is woken for something else.

        Raises:
            InboxDamagedError: a record is not what was written.
        """
        found = self._there(position, until)
        if not found and wait > 0:
            self._listen(wait)
            found = self._there(position, until)
        return found

    def _there(self, position: int, until: int | None) -> list[rollouts.Record]:
        ends = [end for end in (inbox.synced(self.folder), until) if end is not None]
        return list(inbox.read(self.folder, position, min(ends, default=None)))

    def _listen(self, seconds: float) -> None:
        ready, _, _ = select.select([self.socket], [], [], seconds)
        while ready:
            try:
                self.socket.recv(256)
            except BlockingIOError:
                return


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
