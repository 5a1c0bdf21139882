"""Groups of rollouts on their way to a trainer: the inbox of a job's directory.

`<job>/inbox/<start>.log` are segments of one append-only log; a segment's name is the position of its first byte. A
record is a header (length, CRC-32, batch id, digest of what the client sent, CRC-32 of these; little-endian) and a
msgpack `Group`. `<job>/inbox/synced` holds the position up to which all is on the disk: readers go no further, so that
nothing is trained on that could still be lost. What a crash left beyond it and is not whole is cut off before the next
append. Records are never changed and never removed: the trainer is a pure function of them.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.storage.atomic import sync_folder
from arbor_core.types import ArborError, Group, Record

FIELDS, CHECK = struct.Struct("<IIqQ"), struct.Struct("<I")
HEADER_BYTES = FIELDS.size + CHECK.size
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
    """The writer's end. One process writes; it makes groups durable before it says so."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open for appending; a torn tail is cut off, and all else is on the disk when this returns.

        Raises:
            OSError: the folder cannot be written.
            InboxDamagedError: a record that was on the disk is not what was written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.segment_bytes = folder, segment_bytes
        last = max(segments(folder), default=(0, folder / segment_name(0)))
        self.start, path = last
        self.file = path.open("ab", buffering=0)
        self.mark = os.open(folder / SYNCED, os.O_RDWR | os.O_CREAT, 0o600)
        self.end = whole_until(folder, self.start, path)
        os.ftruncate(self.file.fileno(), self.end - self.start)
        os.fsync(self.file.fileno())  # who died here may not have
        os.pwrite(self.mark, POSITION.pack(self.end), 0)
        sync_folder(folder)

    def append(self, groups: Sequence[tuple[Group, int]]) -> list[int]:
        """Write groups, each with a digest of the request that brought it, and wait until they are on the disk.

        Returns:
            The position that follows each. On a disk that became full there are fewer than groups.

        Raises:
            OSError: the disk is full, say; nothing was written.
        """
        if self.end - self.start >= self.segment_bytes:
            self._rotate()
        ends, content = [], bytearray()
        for group, digest in groups:
            payload = msgspec.msgpack.encode(group)
            content += header(payload, group.id, digest) + payload
            ends.append(self.end + len(content))
        try:
            written = self.file.write(content)
            crash_point("inbox.written")
            ends = [end for end in ends if end <= self.end + written]
            if not ends:
                raise OSError(errno.ENOSPC, "the disk took only a part of the record", str(self.folder))
            if written != len(content):
                os.ftruncate(self.file.fileno(), ends[-1] - self.start)
            os.fsync(self.file.fileno())
            crash_point("inbox.synced")
            os.pwrite(self.mark, POSITION.pack(ends[-1]), 0)
        except OSError:
            os.ftruncate(self.file.fileno(), self.end - self.start)
            raise
        self.end = ends[-1]
        crash_point("inbox.marked")
        return ends

    def _rotate(self) -> None:
        fresh = (self.folder / segment_name(self.end)).open("ab", buffering=0)  # a full disk leaves the old one open
        self.file.close()
        self.file, self.start = fresh, self.end
        crash_point("inbox.rotated")
        sync_folder(self.folder)

    def close(self) -> None:
        self.file.close()
        os.close(self.mark)


def header(payload: bytes, id: int, digest: int) -> bytes:
    """What stands before a record's payload."""
    fields = FIELDS.pack(len(payload), zlib.crc32(payload), id, digest)
    return fields + CHECK.pack(zlib.crc32(fields))


def parsed(raw: bytes) -> tuple[int, int, int, int] | None:
    """Payload length, CRC, batch id and digest of a header; None: it is none."""
    fields, check = raw[: FIELDS.size], raw[FIELDS.size :]
    if len(raw) < HEADER_BYTES or CHECK.unpack(check)[0] != zlib.crc32(fields):
        return None
    length, crc, id, digest = FIELDS.unpack(fields)  # noqa: A001
    return length, crc, id, digest


def synced(folder: Path) -> int | None:
    """The position up to which an inbox is on the disk; None: it has no writer (a copy), and all of it is."""
    try:
        raw = (folder / SYNCED).read_bytes()
    except FileNotFoundError:
        return None
    return int(POSITION.unpack(raw)[0]) if len(raw) == POSITION.size else 0


def whole_until(folder: Path, start: int, path: Path) -> int:
    """The position that follows the last whole record of the last segment.

    Raises:
        InboxDamagedError: it lies before what was on the disk.
    """
    end = start
    for offset, length, *_ in headers(path):
        end = start + offset + HEADER_BYTES + length
    known = min(synced(folder) or 0, start + path.stat().st_size)
    if end < known:
        raise InboxDamagedError(folder, end, "no record begins there")
    try:
        for record in read(folder, max(start, known)):  # of a power failure there may be zeros in a whole record
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
        with path.open("rb") as file:
            file.seek(position - start)
            while (until is None or position < until) and (record := _next(file, folder, position)):
                yield record
                position = record.end


def _next(file: Any, folder: Path, position: int) -> Record | None:
    raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        return None
    if (head := parsed(raw)) is None:
        raise InboxDamagedError(folder, position, "no record begins there")
    length, crc, _, digest = head
    payload = file.read(length)
    if len(payload) < length:
        return None
    if zlib.crc32(payload) != crc:
        raise InboxDamagedError(folder, position, "its checksum is another")
    try:
        group = msgspec.msgpack.decode(payload, type=Group)
    except msgspec.DecodeError as error:
        raise InboxDamagedError(folder, position, str(error)) from None
    return Record(position, position + HEADER_BYTES + length, crc, digest, group)


def headers(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Offset, payload length, batch id and digest of a segment's whole records, without reading their payloads."""
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while head := parsed(file.read(HEADER_BYTES)):
            length, _, number, digest = head
            if offset + HEADER_BYTES + length > size:
                return
            yield offset, length, number, digest
            offset += HEADER_BYTES + length
            file.seek(offset)


def end_of(folder: Path, count: int) -> int:
    """The position after the first `count` records, or after the last one if there are fewer."""
    end = 0
    for start, path in segments(folder):
        for offset, length, _, _ in headers(path):
            if count == 0:
                return end
            count, end = count - 1, start + offset + HEADER_BYTES + length
    return end


def segments(folder: Path) -> list[tuple[int, Path]]:
    """The segments with their starts, oldest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.log") if path.stem.isdigit())


def segment_name(start: int) -> str:
    return f"{start:016d}.log"
