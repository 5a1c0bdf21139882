"""The completion ledger: what the model of a live reinforcement job has sampled, token by token.

A reward that names a completion trains exactly what was sampled: its tokens are found here. The ledger is a bounded
log of segments in `<job>/ledger/`, with places in memory; the oldest segment goes when there are too many. It survives
a killed server, and is not synced: after a power failure the last completions may be unknown, and are sampled again.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.types import Completion

HEADER = struct.Struct("<II")
SEGMENT_BYTES = 16 << 20
SEGMENTS = 8
"""So many are kept: 128 MB, some 10,000 completions of 2,000 tokens."""


Place = tuple[int, int, int]
"""Segment, offset and length of a record's payload."""


class Ledger:
    """The ledger of one job. Used from one thread."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES, segments: int = SEGMENTS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.segment_bytes, self.segments = folder, segment_bytes, segments
        self.places: dict[tuple[str, int], Place] = {}
        self.by_key: dict[bytes, list[tuple[str, int]]] = {}
        """Oldest first."""
        self.spent: set[tuple[str, int]] = set()
        self.held: dict[int, list[tuple[tuple[str, int], bytes]]] = {}
        """By segment: what it holds."""
        numbers = sorted(int(path.stem) for path in folder.glob("*.log") if path.stem.isdigit())
        for number in numbers:
            for offset, completion in self._read(number):
                self._note(completion, (number, *offset))
        self.number = numbers[-1] if numbers else 0
        self.file = self._path(self.number).open("ab", buffering=0)
        whole = max((at + length for n, at, length in self.places.values() if n == self.number), default=0)
        self.file.truncate(whole)  # what a killed server left of a record
        self.size = whole
        self.closed = False

    def add(self, completion: Completion) -> None:
        """Write a completion down. On a full disk it stays unknown: the client's reward for it is refused. One that
        comes after `close` is not written: nobody can reward it."""
        if self.closed:
            return
        payload = msgspec.msgpack.encode(completion)
        record = HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            if self.size >= self.segment_bytes:
                self._rotate()
            written = self.file.write(record)
            crash_point("ledger.written")
        except OSError:
            written = 0
        if written != len(record):
            self.file.truncate(self.size)
            return
        self._note(completion, (self.number, self.size + HEADER.size, len(payload)))
        self.size += len(record)

    def get(self, id: str, index: int = 0) -> Completion | None:
        """A completion, if it is still known."""
        place = self.places.get((id, index))
        if place is None:
            return None
        number, offset, length = place
        with self._path(number).open("rb") as file:
            file.seek(offset)
            return msgspec.msgpack.decode(file.read(length), type=Completion)

    def match(
        self, key: bytes, without: frozenset[tuple[str, int]] = frozenset(), tools: bytes | None = None
    ) -> Completion | None:
        """The newest unspent completion with this key that is not among `without`. `tools`: those that it was
        asked for with; None: whichever, because older clients do not say."""
        for known in reversed(self.by_key.get(key, ())):
            if known in self.spent or known in without:
                continue
            if (found := self.get(*known)) and tools in (None, found.toolset):
                return found
        return None

    def spend(self, *completions: tuple[str, int]) -> None:
        """Completions that were put into the inbox: they are not matched and not rewarded again. Forgotten ones
        cannot be anyway."""
        self.spent.update(known for known in completions if known in self.places)

    def _note(self, completion: Completion, place: Place) -> None:
        known = (completion.id, completion.index)
        self.places[known] = place
        self.by_key.setdefault(completion.key, []).append(known)
        self.held.setdefault(place[0], []).append((known, completion.key))

    def _read(self, number: int) -> Iterator[tuple[tuple[int, int], Completion]]:
        content, at = self._path(number).read_bytes(), 0
        while at + HEADER.size <= len(content):
            length, crc = HEADER.unpack_from(content, at)
            at += HEADER.size
            payload = content[at : at + length]
            if len(payload) < length or zlib.crc32(payload) != crc:
                return
            yield (at, length), msgspec.msgpack.decode(payload, type=Completion)
            at += length

    def _rotate(self) -> None:
        """Begin a new segment; the oldest goes when there are too many."""
        fresh = self._path(self.number + 1).open("ab", buffering=0)  # a full disk leaves the old one open
        self.file.close()
        self.file, self.number, self.size = fresh, self.number + 1, 0
        crash_point("ledger.rotated")
        gone = self.number - self.segments
        forgotten = self.held.pop(gone, [])
        for known, _ in forgotten:
            self.places.pop(known, None)
            self.spent.discard(known)
        for key, count in Counter(key for _, key in forgotten).items():
            del self.by_key[key][:count]  # the oldest
            if not self.by_key[key]:
                del self.by_key[key]
        self._path(gone).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.log"

    def close(self) -> None:
        self.closed = True
        self.file.close()


def key_of(messages: Sequence[Mapping[str, Any]], content: str | None) -> bytes:
    """What a completion is found by where its id is not known: all that messages say to a chat template, and what was
    answered. Empty: it is nested too deeply, and found by its id alone."""
    said = [{**message, "content": _text(message.get("content")), "weight": None} for message in messages]
    return _hash([said, content or ""])


def key_of_tools(tools: Sequence[Mapping[str, Any]] | None) -> bytes:
    """Stands for the tools that a template was shown; empty: none, or they are nested too deeply."""
    return _hash(tools) if tools else b""


def _hash(value: Any) -> bytes:
    try:
        return blake2b(msgspec.json.encode(_told(value), order="deterministic"), digest_size=16).digest()
    except RecursionError:
        return b""


def _told(value: Any) -> Any:
    """A value without what says nothing: clients that repeat a message write other empty keys than they were told."""
    if isinstance(value, Mapping):
        return {key: _told(one) for key, one in value.items() if one not in (None, [], {})}
    return [_told(one) for one in value] if isinstance(value, list | tuple) else value


def _text(content: Any) -> Any:
    """A message's content; parts of text are the text they make."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def packed_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return array("i", ids).tobytes()


def packed_floats(values: Sequence[float]) -> bytes:
    """Numbers as little-endian float32."""
    return array("f", values).tobytes()
