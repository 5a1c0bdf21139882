"""The inbox of a job's directory: groups of rollouts on their way to a trainer.

`<job>/inbox/` is a segment log (`storage/segment_log.py`). A segment's number is the position of its first byte in the
whole log; a record's payload is a msgpack `Group`, its header holds besides the batch id and a digest of what the
client sent, and a checksum. `<job>/inbox/synced` holds the position up to which all is on the disk: readers go no
further, so that nothing is trained on that could still be lost. What a crash left beyond it is kept where it is whole.
Records are never changed and never removed: the trainer is a pure function of them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.storage import segment_log
from arbor_core.storage.atomic import sync_folder
from arbor_core.storage.segment_log import DamagedRecordError, RecordFormat, SegmentLog
from arbor_core.types import ArborError, Group, Record

FORMAT = RecordFormat("qQ", checked=True)
HEADER_BYTES = FORMAT.header_bytes
NAME_DIGITS = 16
SYNCED, POSITION = "synced", struct.Struct("<Q")
SEGMENT_BYTES = 64 << 20
"""A segment that has grown beyond it is followed by another."""


class InboxDamagedError(ArborError):
    """A whole record is not what was written. `position` is where it begins."""

    def __init__(self, folder: Path, position: int, why: str) -> None:
        super().__init__(
            f"the inbox {folder} is damaged at position {position}: {why}. What was trained cannot be repeated from "
            "it: restore the file from a backup, or start a new job"
        )
        self.position = position


class Inbox:
    """The writing end. One process writes; groups are on the disk when `append` returns."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open for appending; a torn tail is cut off, and all else is on the disk when this returns.

        Raises:
            OSError: the folder cannot be written.
            InboxDamagedError: a record that was on the disk is not what was written.
        """
        self.folder, self.segment_bytes = folder, segment_bytes
        self.log = SegmentLog("inbox", folder, digits=NAME_DIGITS)
        start = self.log.number
        self.log.cut_tail(whole_until(folder, start, self.log.path(start)) - start)
        self.mark = os.open(folder / SYNCED, os.O_RDWR | os.O_CREAT, 0o600)
        os.fsync(self.log.file.fileno())  # an earlier writer may have died before it did
        os.pwrite(self.mark, POSITION.pack(self.end), 0)
        sync_folder(folder)

    @property
    def end(self) -> int:
        """The position that follows the last record."""
        return self.log.number + self.log.size

    def append(self, groups: Sequence[tuple[Group, int]]) -> list[int]:
        """Write groups, each with a digest of the request that brought it, and wait until they are on the disk.

        Returns:
            The position that follows each. On a disk that became full there are fewer than groups.

        Raises:
            OSError: the disk is full, for example; nothing was written.
        """
        if self.log.size >= self.segment_bytes:
            self.log.rotate(self.end)
            sync_folder(self.folder)
        ends = self.log.append([_record(group, digest) for group, digest in groups], self._commit)
        crash_point("inbox.marked")
        return [self.log.number + end for end in ends]

    def _commit(self, size: int) -> None:
        os.fsync(self.log.file.fileno())
        crash_point("inbox.synced")
        os.pwrite(self.mark, POSITION.pack(self.log.number + size), 0)

    def close(self) -> None:
        self.log.close()
        os.close(self.mark)


def segments(folder: Path) -> list[tuple[int, Path]]:
    """The segments with their starts, oldest first."""
    return segment_log.segments(folder)


def _record(group: Group, digest: int) -> bytes:
    payload = msgspec.msgpack.encode(group)
    return FORMAT.header(payload, group.id, digest) + payload


def synced(folder: Path) -> int | None:
    """The position up to which an inbox is on the disk; None: it has no writer (a copy), and all of it is."""
    try:
        raw = (folder / SYNCED).read_bytes()
    except FileNotFoundError:
        return None
    return int(POSITION.unpack(raw)[0]) if len(raw) == POSITION.size else 0


def whole_until(folder: Path, start: int, path: Path) -> int:
    """The position that follows the last whole record of the last segment, which begins at `start`.

    Raises:
        InboxDamagedError: it lies before what was on the disk.
    """
    end = start
    for head in segment_log.headers(path, FORMAT):
        end = start + head.end
    known = min(synced(folder) or 0, start + path.stat().st_size)
    if end < known:
        raise InboxDamagedError(folder, end, "no record begins there")
    try:
        for record in read(folder, max(start, known)):  # after a power failure a whole record may hold zeros
            end = record.end
    except InboxDamagedError as error:
        end = error.position
    return end


def read(folder: Path, position: int, until: int | None = None) -> Iterator[Record]:
    """The whole records from `position` on; ends at `until`, or where the log ends now.

    Raises:
        InboxDamagedError: a record is not what was written.
    """
    for start, path in segments(folder):
        if position >= start + path.stat().st_size:
            continue
        records = _read_segment(folder, start, path, position)
        while (until is None or position < until) and (record := next(records, None)):
            yield record
            position = record.end


def _read_segment(folder: Path, start: int, path: Path, position: int) -> Iterator[Record]:
    try:
        for head, payload in segment_log.records(path, FORMAT, position - start):
            position = start + head.start
            group = msgspec.msgpack.decode(payload, type=Group)
            yield Record(position, start + head.end, head.crc, head.extra[1], group)
    except DamagedRecordError as error:
        raise InboxDamagedError(folder, start + error.start, str(error)) from None
    except msgspec.DecodeError as error:
        raise InboxDamagedError(folder, position, str(error)) from None


def headers(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Offset, payload length, batch id and digest of a segment's whole records, without reading their payloads."""
    for head in segment_log.headers(path, FORMAT):
        batch_id, digest = head.extra
        yield head.start, head.end - head.payload_start, batch_id, digest


def end_of(folder: Path, count: int) -> int:
    """The position after the first `count` records, or after the last one if there are fewer."""
    end = 0
    for start, path in segments(folder):
        for head in segment_log.headers(path, FORMAT):
            if count == 0:
                return end
            count, end = count - 1, start + head.end
    return end
