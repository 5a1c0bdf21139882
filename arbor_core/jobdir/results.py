"""The results of a job's directory: what a trainer answers to the commands in its inbox, on the way back to clients.

`<job>/results/` is a log whose records are on the disk before they are read (`storage/synced_log.py`). A record's
number is that of the command that it answers, its digest the command's. The trainer appends (rank 0), one attempt at a
time; the server reads, and drops what was acknowledged: `<job>/results/acknowledged` holds the number up to which, and
segments whose results lie below it are removed, but for the last one. The first result of a command stands: a trainer
that goes on from a checkpoint executes later commands again, and what it answers then is not written.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from arbor_core.crash_points import crash_point
from arbor_core.storage.atomic import sync_folder
from arbor_core.storage.synced_log import (
    POSITION,
    Entry,
    LogDamagedError,
    Place,
    SyncedLog,
    places,
    read,
    segments,
    synced,
)
from arbor_core.types import Command

SEGMENT_BYTES = 16 << 20
"""A segment that has grown beyond it is followed by another: acknowledged results are dropped in such pieces."""
MAX_RESULT_BYTES = 256 << 20
ACKNOWLEDGED = "acknowledged"


class Numbers:
    """A set of numbers from 1 on in which gaps close sooner or later."""

    def __init__(self, until: int = 0) -> None:
        self.until = until
        """All up to this one are in it."""
        self.beyond: set[int] = set()

    def add(self, *numbers: int) -> None:
        self.beyond.update(number for number in numbers if number > self.until)
        while self.until + 1 in self.beyond:
            self.until += 1
            self.beyond.discard(self.until)

    def add_until(self, number: int) -> None:
        """Add all up to a number."""
        self.until = max(self.until, number)
        self.beyond = {other for other in self.beyond if other > self.until}
        self.add()

    def __contains__(self, number: int) -> bool:
        return number <= self.until or number in self.beyond


class Results(SyncedLog):
    """The writing end: rank 0 of the attempt that runs."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open for appending; waits for an earlier attempt's process that ends.

        Raises:
            OSError: the folder cannot be written, or another process has it open.
            LogDamagedError: a result that was on the disk is not what was written.
        """
        super().__init__("results", folder, segment_bytes, sync_mark=True, exclusive=True)
        self.answered = Numbers()
        """The commands that have a result."""
        self.checksums: dict[int, int] = {}
        """CRC-32 of the results that are there, of earlier attempts."""
        for place in places(folder):
            self.answered.add(place.number)
            self.checksums[place.number] = place.crc
        self.answered.add_until(acknowledged(folder))  # after the log: what is dropped meanwhile was acknowledged

    def answer(self, command: Command, payload: bytes) -> bool:
        """Write the result of a command; it is on the disk when this returns. False: it has one, which stands.

        Raises:
            OSError: the disk is full, for example; nothing was written.
        """
        if len(payload) > MAX_RESULT_BYTES:
            raise ValueError(f"the result of command {command.number} has {len(payload)} bytes: {MAX_RESULT_BYTES} fit")
        if command.number in self.answered:
            return False
        self.append([Entry(command.number, command.digest, payload)])
        self.answered.add(command.number)
        return True

    def differs(self, number: int, payload: bytes) -> bool:
        """Whether a command that is executed again gets another answer than before, as far as is known; asked once."""
        before = self.checksums.pop(number, None)
        return before is not None and before != zlib.crc32(payload)


def acknowledged(folder: Path) -> int:
    """The number up to which results were acknowledged."""
    try:
        raw = (folder / ACKNOWLEDGED).read_bytes()
    except FileNotFoundError:
        return 0
    return int(POSITION.unpack(raw)[0]) if raw else 0


def acknowledge(folder: Path, number: int) -> None:
    """Write down up to which number results were acknowledged; it is on the disk when this returns."""
    handle = os.open(folder / ACKNOWLEDGED, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(handle, POSITION.pack(number), 0)  # as a whole: no sector is written in parts
        os.fsync(handle)
    finally:
        os.close(handle)
    sync_folder(folder)
    crash_point("results.acknowledged")


def drop(folder: Path, needed: int) -> None:
    """Remove the segments before the one of the first result that is needed. Never the last: it is the writer's.

    Args:
        needed: Where that result begins; where the known results end, if none of them is.
    """
    there = segments(folder)
    for (_, path), (following, _) in pairwise(there):
        if following > needed:
            return
        path.unlink(missing_ok=True)
        crash_point("results.dropped")


def payload(folder: Path, place: Place) -> bytes:
    """What was answered.

    Raises:
        LogDamagedError: it is not what was written.
    """
    for found, content in read(folder, place.start, place.end):
        if found == place:
            return content
    raise LogDamagedError(folder, place.start, "the result that stood there is gone")


def readable(folder: Path, position: int) -> Iterator[Place]:
    """The results from a position on that are on the disk: clients may be told them.

    Raises:
        LogDamagedError: one is not what was written.
    """
    return places(folder, position, synced(folder) or 0)
