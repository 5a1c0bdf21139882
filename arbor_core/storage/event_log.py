"""Append-only logs of one JSON record a line, and small files that are replaced as a whole.

A record counts once its newline is written: a torn tail (a line without one, left by a crash) is not read, and is cut
off before the next append.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
READ_BYTES = 1 << 20


class Log:
    """One writer's end of a log. What cannot be written now (the disk is full) waits in memory and goes with the next
    record; a part of it is never left in the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(path)
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.end = path.stat().st_size
        self.waiting = b""

    def append(self, record: Any, *, durable: bool = False) -> bool:
        """Write one record, and what waits; returns whether it is written, with `durable` also to the disk itself."""
        self.waiting += msgspec.json.encode(record) + b"\n"
        return self.flush(durable=durable)

    def flush(self, *, durable: bool = False) -> bool:
        """Write what waits."""
        try:
            written = self.file.write(self.waiting) if self.waiting else 0
            if written == len(self.waiting):
                if durable:
                    os.fsync(self.file.fileno())
                self.end, self.waiting = self.end + written, b""
                return True
        except OSError:
            traceback.print_exc()
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


def tail(path: Path, offset: int, type_: type[T]) -> Iterator[tuple[int, T]]:
    """Whole records from `offset` (bytes) on, each with the offset that follows it.

    Raises:
        msgspec.DecodeError: a whole line that is not a record: the log was tampered with or the disk lies.
    """
    decoder = msgspec.json.Decoder(type_)
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
            yield offset, decoder.decode(line)
