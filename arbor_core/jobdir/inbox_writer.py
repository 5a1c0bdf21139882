"""Writes what comes for one job into its inbox. What comes while it writes is written together, with one sync."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from arbor_core.process.wakeup import wake

from .inbox import Entry, Inbox
from .layout import JobDir


@dataclass
class Sending:
    """A record that waits to be written."""

    entry: Entry
    position: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Where the record begins in the inbox, once it is on the disk; or why it could not be written."""


class InboxWriter:
    """One job's inbox, as the server writes it.

    Args:
        folder: The job's directory.
        settle: Called with each record and its position in the inbox, or the error, before its sender hears of it.
    """

    def __init__(self, folder: JobDir, settle: Callable[[Sending, int | Exception], None]) -> None:
        self.folder, self.settle = folder, settle
        self.inbox = Inbox(folder.inbox)
        self.queue: list[Sending] = []
        self.writing: asyncio.Task[None] | None = None

    def send(self, entry: Entry) -> Sending:
        """Have a record written."""
        sending = Sending(entry)
        self.queue.append(sending)
        if self.writing is None:
            self.writing = asyncio.create_task(self._write())
        return sending

    async def _write(self) -> None:
        """Write what waits until nothing waits."""
        while self.queue:
            batch = self.queue[:]
            try:
                begin = self.inbox.end
                ends = await asyncio.to_thread(self.inbox.append, [one.entry for one in batch])
                full = OSError(errno.ENOSPC, "the disk became full", str(self.folder.inbox))
                starts: Sequence[int | Exception] = [begin, *ends[:-1]] + [full] * (len(batch) - len(ends))
            except Exception as error:  # each sender gets it
                starts = [error] * len(batch)
            del self.queue[: len(batch)]
            for sending, start in zip(batch, starts, strict=True):
                self._finish(sending, start)
            wake(self.folder.inbox_bell, "")
        self.writing = None

    def _finish(self, sending: Sending, start: int | Exception) -> None:
        self.settle(sending, start)
        if isinstance(start, Exception):
            sending.position.set_exception(start)
            sending.position.exception()  # its sender may be gone
        else:
            sending.position.set_result(start)

    def close(self) -> None:
        """Close the inbox; what is being written is written first."""
        if self.writing is None:
            self.inbox.close()
        else:
            self.writing.add_done_callback(lambda _: self.inbox.close())
