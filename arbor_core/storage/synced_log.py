"""Logs whose records are on the disk before anybody reads them: the inbox of a job and its results.

A segment log (`segment_log`) of opaque records. A segment's number is the position of its first byte in the whole log;
a record's header holds besides a number of the log's own, a digest of what the sender sent, and a checksum.
`<folder>/synced` holds the position up to which all is on the disk: readers go no further, so that nothing is acted on
that could still be lost. What a crash left beyond it is kept where it is whole.

`ARBOR_SEGMENT_BYTES=n` has tests come to where one segment follows another without writing megabytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from arbor_core.crash_points import crash_point
from arbor_core.types import ArborError

from . import segment_log
from .atomic import sync_folder
from .segment_log import DamagedRecordError, RecordFormat, SegmentLog

TEST_BYTES = int(os.environ.get("ARBOR_SEGMENT_BYTES", "0"))
FORMAT = RecordFormat("qQ", checked=True)
HEADER_BYTES = FORMAT.header_bytes
NAME_DIGITS = 16
SYNCED, POSITION = "synced", struct.Struct("<Q")
LOCK_SECONDS, LOCK_POLL_SECONDS = 10.0, 0.05
"""How long a writer waits for one that is about to end, and how often it looks."""


class Entry(NamedTuple):
    """What is appended."""

    number: int
    """Of the log's own; signed, 64 bits."""
    digest: int
    """Of what the sender sent; 64 bits."""
    payload: bytes


class Place(NamedTuple):
    """Where a record stands, and what its header says. Positions are in bytes, from the begin of the log."""

    start: int
    end: int
    crc: int
    """CRC-32 of the payload."""
    number: int
    digest: int


class LogDamagedError(ArborError):
    """A whole record is not what was written. `position` is where it begins."""

    def __init__(self, folder: Path, position: int, why: str) -> None:
        where = f"jobs/{folder.parent.name}/{folder.name} in the storage directory"  # clients may hear of it
        super().__init__(
            f"the log {where} is damaged at position {position}: {why}. What was trained cannot be repeated from it: "
            "restore the file from a backup, or start a new job"
        )
        self.position = position


class SyncedLog:
    """The writing end. One process writes; records are on the disk when `append` returns."""

    def __init__(
        self, name: str, folder: Path, segment_bytes: int, *, sync_mark: bool = False, exclusive: bool = False
    ) -> None:
        """Open for appending; a torn tail is cut off, and all else is on the disk when this returns.

        Args:
            name: What its crash points are called after.
            segment_bytes: A segment that has grown beyond it is followed by another.
            sync_mark: Wait for the mark too, so that after a power failure readers still find all that they had read
                before this log is opened again.
            exclusive: Refuse to open what another process has open; wait for one that ends.

        Raises:
            OSError: the folder cannot be written, or another process has it open.
            LogDamagedError: a record that was on the disk is not what was written.
        """
        self.folder, self.segment_bytes, self.sync_mark = folder, TEST_BYTES or segment_bytes, sync_mark
        folder.mkdir(parents=True, exist_ok=True)
        self.mark = os.open(folder / SYNCED, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if exclusive:
                _lock(self.mark, folder)
            self.log = self._opened(name)
        except BaseException:
            os.close(self.mark)
            raise

    def _opened(self, name: str) -> SegmentLog:
        """The segments, on the disk as far as they are whole."""
        log = SegmentLog(name, self.folder, digits=NAME_DIGITS)
        try:
            start = log.number
            log.cut_tail(whole_until(self.folder, start, log.path(start)) - start)
            os.fsync(log.file.fileno())  # an earlier writer may have died before it did
            self._move_mark(start + log.size)
            sync_folder(self.folder)
        except BaseException:
            log.close()
            raise
        return log

    @property
    def end(self) -> int:
        """The position that follows the last record."""
        return self.log.number + self.log.size

    def append(self, entries: Sequence[Entry]) -> list[int]:
        """Write records and wait until they are on the disk.

        Returns:
            The position that follows each. On a disk that became full there are fewer than entries.

        Raises:
            OSError: the disk is full, for example; nothing was written.
        """
        if self.log.size >= self.segment_bytes:
            self.log.rotate(self.end)
            sync_folder(self.folder)
        ends = self.log.append([encoded(entry) for entry in entries], self._commit)
        crash_point(f"{self.log.name}.marked")
        return [self.log.number + end for end in ends]

    def _commit(self, size: int) -> None:
        os.fsync(self.log.file.fileno())
        crash_point(f"{self.log.name}.synced")
        self._move_mark(self.log.number + size)

    def _move_mark(self, position: int) -> None:
        os.pwrite(self.mark, POSITION.pack(position), 0)
        if self.sync_mark:
            os.fdatasync(self.mark)

    def close(self) -> None:
        self.log.close()
        os.close(self.mark)


def _lock(handle: int, folder: Path) -> None:
    """Lock a log until the handle is closed, or the process ends."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process writes this log", str(folder)) from None
            time.sleep(LOCK_POLL_SECONDS)
        else:
            return


def segments(folder: Path) -> list[tuple[int, Path]]:
    """The segments with their starts, oldest first."""
    return segment_log.segments(folder)


def encoded(entry: Entry) -> bytes:
    """A record as it is written."""
    return FORMAT.header(entry.payload, entry.number, entry.digest) + entry.payload


def synced(folder: Path) -> int | None:
    """The position up to which a log is on the disk; None: it has no writer (a copy), and all of it is."""
    try:
        raw = (folder / SYNCED).read_bytes()
    except FileNotFoundError:
        return None
    return int(POSITION.unpack(raw)[0]) if len(raw) == POSITION.size else 0


def whole_until(folder: Path, start: int, path: Path) -> int:
    """The position that follows the last whole record of the last segment, which begins at `start`.

    Raises:
        LogDamagedError: it lies before what was on the disk.
    """
    end = start
    for head in segment_log.headers(path, FORMAT):
        end = start + head.end
    known = min(synced(folder) or 0, start + path.stat().st_size)
    if end < known:
        raise LogDamagedError(folder, end, "no record begins there")
    try:
        for place, _ in read(folder, max(start, known)):  # after a power failure a whole record may hold zeros
            end = place.end
    except LogDamagedError as error:
        end = error.position
    return end


def read(folder: Path, position: int, until: int | None = None) -> Iterator[tuple[Place, bytes]]:
    """The whole records from `position` on, with their payloads; ends at `until`, or where the log ends now.

    Raises:
        LogDamagedError: a record is not what was written, or is gone.
    """
    there = segments(folder)
    position = max(position, there[0][0] if there else 0)
    for start, path in there:
        if start > position:  # only the last segment may end with a torn tail
            raise LogDamagedError(folder, position, "no record begins there")
        if position >= start + path.stat().st_size:
            continue
        records = _read_segment(folder, start, path, position)
        while (until is None or position < until) and (record := next(records, None)):
            yield record
            position = record[0].end


def _read_segment(folder: Path, start: int, path: Path, position: int) -> Iterator[tuple[Place, bytes]]:
    try:
        for head, payload in segment_log.records(path, FORMAT, position - start):
            yield _place(start, head), payload
    except DamagedRecordError as error:
        raise LogDamagedError(folder, start + error.start, str(error)) from None


def _place(start: int, head: segment_log.Header) -> Place:
    number, digest = head.extra
    return Place(start + head.start, start + head.end, head.crc, number, digest)


def places(folder: Path, position: int = 0, until: int | None = None) -> Iterator[Place]:
    """Where the whole records from `position` on stand, without reading their payloads; ends at `until`, or where the
    log ends now. Segments that are removed meanwhile are passed over.

    Raises:
        LogDamagedError: one of them is gone, or they end before `until`.
    """
    there = segments(folder)
    end = max(position, there[0][0] if there else 0)
    for (start, path), following in zip_longest(there, [start for start, _ in there[1:]]):
        try:
            if end >= start + path.stat().st_size:
                continue
            for head in segment_log.headers(path, FORMAT, end - start):
                if until is not None and start + head.end > until:
                    return
                end = start + head.end
                yield _place(start, head)
        except FileNotFoundError:
            end = max(end, following or 0)
        if following and end < following:  # only the last segment may end with a torn tail
            raise LogDamagedError(folder, end, "no record begins there")
    if until is not None and end < until:
        raise LogDamagedError(folder, end, "no record begins there")


def headers(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Offset, payload length, number and digest of a segment's whole records, without reading their payloads."""
    for head in segment_log.headers(path, FORMAT):
        number, digest = head.extra
        yield head.start, head.end - head.payload_start, number, digest


def end_of(folder: Path, count: int) -> int:
    """The position after the first `count` records, or after the last one if there are fewer."""
    end = 0
    for place in places(folder):
        if count == 0:
            return end
        count, end = count - 1, place.end
    return end
