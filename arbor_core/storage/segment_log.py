"""Append-only logs in numbered segments, with a checksum for each record: the inbox and the results of a job (through
`synced_log`), the completion ledger, and the samples.

A segment is a file `<number>.log`. A record is a header and its payload; the header holds the payload's length and
CRC-32, further integers of the log's own, and with `RecordFormat.checked` the CRC-32 of all these, little-endian. What
a crash left at the end of the last segment and is no whole record, a torn tail, is not read, and is cut off before the
next append.

What differs stays with each log: what a segment's number means, when its records are durable, and which segments are
removed.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from arbor_core.crash_points import crash_point

CHECK = struct.Struct("<I")


class Header(NamedTuple):
    """What stands before a record's payload. Offsets are in bytes, from the begin of the segment."""

    start: int
    payload_start: int
    end: int
    crc: int
    extra: tuple[int, ...]
    """The integers of the log's own."""


class RecordFormat:
    """The format of a log's headers.

    Args:
        extra: The log's own integers, as `struct` writes them.
        checked: Whether a header has a checksum too, so that a damaged one is told from a torn tail.
    """

    def __init__(self, extra: str = "", *, checked: bool = False) -> None:
        self.fields = struct.Struct(f"<II{extra}")
        self.checked = checked
        self.header_bytes = self.fields.size + (CHECK.size if checked else 0)

    def header(self, payload: bytes, *extra: int) -> bytes:
        """The header of a payload."""
        fields = self.fields.pack(len(payload), zlib.crc32(payload), *extra)
        return fields + CHECK.pack(zlib.crc32(fields)) if self.checked else fields

    def parse(self, raw: bytes, start: int) -> Header | None:
        """The header of a record that begins at `start`; None: `raw` (`header_bytes` bytes) is no header."""
        fields, check = raw[: self.fields.size], raw[self.fields.size :]
        if self.checked and CHECK.unpack(check)[0] != zlib.crc32(fields):
            return None
        length, crc, *extra = self.fields.unpack(fields)
        payload_start = start + self.header_bytes
        return Header(start, payload_start, payload_start + length, crc, tuple(extra))


class DamagedRecordError(Exception):
    """A record is not what was written. `start` is where it begins in its segment."""

    def __init__(self, start: int, reason: str) -> None:
        super().__init__(reason)
        self.start = start


class SegmentLog:
    """The writing end of a log. One process appends, always to the last segment.

    Args:
        name: What its crash points are called after.
        digits: Numbers are padded to that many in file names.
    """

    def __init__(self, name: str, folder: Path, *, digits: int = 1) -> None:
        """Open the last segment, or the first one of a new log. Call `cut_tail` before the first append.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self.digits = name, folder, digits
        self.number, path = max(segments(folder), default=(0, self.path(0)))
        """Of the segment that is open."""
        self.file = path.open("ab", buffering=0)
        self.size = path.stat().st_size
        """Bytes in the open segment."""

    def path(self, number: int) -> Path:
        """The file of a segment."""
        return self.folder / f"{number:0{self.digits}d}.log"

    def cut_tail(self, size: int) -> None:
        """Truncate the open segment to the first `size` bytes, which are whole records."""
        os.ftruncate(self.file.fileno(), size)
        self.size = size

    def append(self, records: Sequence[bytes], commit: Callable[[int], None] | None = None) -> list[int]:
        """Write records, each with its header, to the open segment.

        Args:
            commit: Called with the new size of the segment, to make the records durable.

        Returns:
            The offset that follows each record. On a disk that became full there are fewer than records.

        Raises:
            OSError: the disk is full, for example, or `commit` failed; nothing of the records is left.
        """
        ends = list(accumulate(map(len, records), initial=self.size))[1:]
        try:
            written = self.file.write(b"".join(records))
            crash_point(f"{self.name}.written")
            ends = [end for end in ends if end <= self.size + written]
            if not ends:
                raise OSError(errno.ENOSPC, "the disk took only a part of the record", str(self.folder))
            if ends[-1] < self.size + written:
                os.ftruncate(self.file.fileno(), ends[-1])
            if commit:
                commit(ends[-1])
        except OSError:
            os.ftruncate(self.file.fileno(), self.size)
            raise
        self.size = ends[-1]
        return ends

    def rotate(self, number: int) -> None:
        """Begin the segment `number`.

        Raises:
            OSError: the disk is full, for example; the segment before stays open.
        """
        following = self.path(number).open("ab", buffering=0)
        self.file.close()
        self.file, self.number, self.size = following, number, 0
        crash_point(f"{self.name}.rotated")

    def close(self) -> None:
        self.file.close()


def segments(folder: Path) -> list[tuple[int, Path]]:
    """The segments of a log with their numbers, lowest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.log") if path.stem.isdigit())


def headers(path: Path, record_format: RecordFormat, start: int = 0) -> Iterator[Header]:
    """The headers of a segment's whole records from the offset `start` on; ends at the first one that is damaged. No
    payload is read."""
    size, offset = path.stat().st_size, start
    with path.open("rb") as file:
        file.seek(start)
        while len(raw := file.read(record_format.header_bytes)) == record_format.header_bytes:
            header = record_format.parse(raw, offset)
            if header is None or header.end > size:
                return
            yield header
            offset = file.seek(header.end)


def records(path: Path, record_format: RecordFormat, start: int = 0) -> Iterator[tuple[Header, bytes]]:
    """A segment's whole records from the offset `start` on: their headers and payloads.

    Raises:
        DamagedRecordError: a record is not what was written.
    """
    with path.open("rb") as file:
        file.seek(start)
        while len(raw := file.read(record_format.header_bytes)) == record_format.header_bytes:
            header = record_format.parse(raw, start)
            if header is None:
                raise DamagedRecordError(start, "no record begins there")
            length = header.end - header.payload_start
            payload = file.read(min(length, os.fstat(file.fileno()).st_size))  # a torn length may be anything
            if len(payload) < length:
                return
            if zlib.crc32(payload) != header.crc:
                raise DamagedRecordError(start, "its checksum does not match")
            yield header, payload
            start = header.end


def backwards(path: Path, record_format: RecordFormat, last: int | None = None) -> Iterator[tuple[Header, bytes]]:
    """A segment's whole records, the newest first, without those that are damaged. Only their headers are read before
    the first; each payload is read when its turn comes.

    Args:
        last: Offset of the record to begin with, or of any place in it; None: the newest.
    """
    with path.open("rb") as file:
        for header in reversed(list(headers(path, record_format))):
            if last is not None and header.start > last:
                continue
            file.seek(header.payload_start)
            payload = file.read(header.end - header.payload_start)
            if zlib.crc32(payload) == header.crc:
                yield header, payload
