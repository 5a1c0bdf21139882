"""The log of an attempt's events: one JSON object a line, appended.

A record counts once its newline is written: a torn tail (a line without one, left by a crash) is not read, and is cut
off before the next append.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec

from arbor_core.types import Event, decode_event

READ_BYTES = 1 << 20


class EventLog:
    """The writing end of a log. Records that cannot be written now (the disk is full) wait in memory and are written
    with the next one; a part of a record is never left in the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(path)
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.end = path.stat().st_size
        """Offset that follows the last whole record, in bytes."""
        self.unwritten = b""
        self.error: OSError | None = None
        """Why records wait that could not be written; None where the disk took a part of them: it is full."""

    def append(self, record: Event, *, durable: bool = False) -> bool:
        """Write one record, after those that wait.

        Args:
            durable: Wait until it is on the disk itself.

        Returns:
            Whether it was written.
        """
        self.unwritten += msgspec.json.encode(record) + b"\n"
        return self.flush(durable=durable)

    def flush(self, *, durable: bool = False) -> bool:
        """Write the records that wait; see `append`."""
        self.error = None
        try:
            written = self.file.write(self.unwritten) if self.unwritten else 0
            if written == len(self.unwritten):
                if durable:
                    os.fsync(self.file.fileno())
                self.end, self.unwritten = self.end + written, b""
                return True
        except OSError as error:
            self.error = error
            traceback.print_exc()
        if os.fstat(self.file.fileno()).st_size > self.end:
            os.ftruncate(self.file.fileno(), self.end)
        return False

    def close(self) -> None:
        self.file.close()


def cut_torn_tail(path: Path) -> None:
    """Truncate a log after its last newline."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            start = max(0, start - READ_BYTES)
            file.seek(start)
            newline = file.read(min(READ_BYTES, end - start)).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
        file.truncate(0)


def tail(path: Path, offset: int = 0) -> Iterator[tuple[int, Event]]:
    """The events from `offset` on, each with the offset that follows it; offsets are in bytes. Reads as it goes.

    Raises:
        msgspec.DecodeError: a whole line is no event: the log was changed, or the disk is faulty.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, decode_event(line)
