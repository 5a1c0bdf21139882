"""A worker's side of its job's inbox: groups of rollouts in order of arrival, or commands in order of their numbers."""

from __future__ import annotations

import select
import socket
from functools import cached_property
from pathlib import Path

from arbor_core.jobdir import commands, groups, inbox
from arbor_core.process.wakeup import short_address
from arbor_core.types import Command, rollouts

TAKEN_BYTES = 16 << 20
"""Of the commands that are taken at once."""


class Listener:
    """A socket that wakes the reader of a job's inbox when something was appended, or something else is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bell = folder, folder / "bell"
        folder.mkdir(parents=True, exist_ok=True)
        self.bell.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with short_address(self.bell) as address:
            self.socket.bind(address)

    def listen(self, seconds: float) -> None:
        """Wait until it is woken, up to so many seconds."""
        ready, _, _ = select.select([self.socket], [], [], seconds)
        while ready:
            try:
                self.socket.recv(256)
            except BlockingIOError:
                return


class Feed(Listener):
    """The reading end of an inbox of groups."""

    def take(self, position: int, wait: float, until: int | None = None) -> list[rollouts.Record]:
        """The records from a position on, and before `until`; waits up to `wait` seconds for the first, or until
        it is woken for something else.

        Raises:
            InboxDamagedError: a record is not what was written.
        """
        found = self._there(position, until)
        if not found and wait > 0:
            self.listen(wait)
            found = self._there(position, until)
        return found

    def _there(self, position: int, until: int | None) -> list[rollouts.Record]:
        ends = [end for end in (inbox.synced(self.folder), until) if end is not None]
        return list(groups.read(self.folder, position, min(ends, default=None)))


class CommandFeed(Listener):
    """The reading end of an inbox of commands, which are taken in the order of their numbers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.after = self.seen = self.taken = 0
        self.places: dict[int, inbox.Place] = {}
        """Of the commands that are not taken yet, by number, as far as the inbox was seen."""

    def take(self, after: int, wait: float) -> list[Command]:
        """The commands `after` + 1, `after` + 2, ... as far as all before them are there, some megabytes at a time;
        waits up to `wait` seconds for the first, or until it is woken for something else.

        Raises:
            InboxDamagedError: a record is not what was written.
        """
        if not self.has(after + 1) and wait > 0:
            self.listen(wait)
        found: list[Command] = []
        size = 0
        while size < TAKEN_BYTES and self.has(after + 1 + len(found)):
            command = commands.read(self.folder, self.places[after + 1 + len(found)].start)
            found.append(command)
            size += len(command.payload)
        self.taken = after + len(found)
        self._forget(after)
        return found

    def has(self, number: int) -> bool:
        """Whether a command has come. Only numbers above those that were taken may be asked for."""
        if number <= self.after:  # taken up anew, from an earlier checkpoint
            self.after = self.seen = 0
            self.places.clear()
        if number not in self.places:
            for place in inbox.places(self.folder, self.seen, inbox.synced(self.folder)):
                self.seen = place.end
                if place.number > self.after:
                    self.places.setdefault(place.number, place)
        return number in self.places

    def _forget(self, until: int) -> None:
        """Forget the commands up to a number: they were taken."""
        self.after = until
        self.places = {number: place for number, place in self.places.items() if number > until}


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
