"""The completion ledger: what the model of a live reinforcement job has sampled, token by token.

A reward that names a completion trains exactly what was sampled: its tokens are found here. The ledger is a segment log
(`storage/segment_log.py`) in `<job>/ledger/` with an index in memory; the oldest segment is removed when there are too
many. It survives a killed server, and is not synced: after a power failure the last completions may be unknown, and are
sampled again.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.storage.segment_log import DamagedRecordError, Header, RecordFormat, SegmentLog, records, segments
from arbor_core.types import Completion

FORMAT = RecordFormat()
SEGMENT_BYTES = 16 << 20
SEGMENTS = 8
"""How many are kept: 128 MB, some 10,000 completions of 2,000 tokens."""

Place = tuple[int, int, int]
"""Segment, offset and length of a record's payload."""


class Ledger:
    """The ledger of one job. Used from one thread."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES, max_segments: int = SEGMENTS) -> None:
        self.segment_bytes, self.max_segments = segment_bytes, max_segments
        self.places: dict[tuple[str, int], Place] = {}
        self.by_key: dict[bytes, list[tuple[str, int]]] = {}
        """Oldest first."""
        self.spent: set[tuple[str, int]] = set()
        self.by_segment: dict[int, list[tuple[tuple[str, int], bytes]]] = {}
        """Names and keys of the completions in each segment."""
        end = 0
        for number, path in segments(folder):
            end = 0
            for header, completion in _completions(path):
                self._note(completion, (number, header.payload_start, header.end - header.payload_start))
                end = header.end
        self.log = SegmentLog("ledger", folder)
        self.log.cut_tail(end)
        self.closed = False

    def add(self, completion: Completion) -> None:
        """Write a completion down. On a full disk it stays unknown: the client's reward for it is refused. One that
        comes after `close` is not written: nobody can reward it."""
        if self.closed:
            return
        payload = msgspec.msgpack.encode(completion)
        try:
            if self.log.size >= self.segment_bytes:
                self._rotate()
            (end,) = self.log.append([FORMAT.header(payload) + payload])
        except OSError:
            return
        self._note(completion, (self.log.number, end - len(payload), len(payload)))

    def get(self, id: str, index: int = 0) -> Completion | None:
        """A completion, if it is still known."""
        place = self.places.get((id, index))
        if place is None:
            return None
        number, offset, length = place
        with self.log.path(number).open("rb") as file:
            file.seek(offset)
            return msgspec.msgpack.decode(file.read(length), type=Completion)

    def match(
        self, key: bytes, without: frozenset[tuple[str, int]] = frozenset(), tools: bytes | None = None
    ) -> Completion | None:
        """The newest unspent completion with this key that is not among `without`.

        Args:
            tools: The key of the tools in its request (`key_of_tools`); None: any, because older clients do not say.
        """
        for name in reversed(self.by_key.get(key, ())):
            if name in self.spent or name in without:
                continue
            if (completion := self.get(*name)) and tools in (None, completion.toolset):
                return completion
        return None

    def spend(self, *completions: tuple[str, int]) -> None:
        """Mark completions that are put into the inbox: they are not matched and not rewarded again. Forgotten ones
        cannot be anyway."""
        self.spent.update(name for name in completions if name in self.places)

    def unspend(self, *completions: tuple[str, int]) -> None:
        """Take the mark back: they could not be put into the inbox."""
        self.spent.difference_update(completions)

    def _note(self, completion: Completion, place: Place) -> None:
        name = (completion.id, completion.index)
        self.places[name] = place
        self.by_key.setdefault(completion.key, []).append(name)
        self.by_segment.setdefault(place[0], []).append((name, completion.key))

    def _rotate(self) -> None:
        """Begin a new segment; the oldest is removed when there are too many."""
        self.log.rotate(self.log.number + 1)
        oldest = self.log.number - self.max_segments
        forgotten = self.by_segment.pop(oldest, [])
        for name, _ in forgotten:
            self.places.pop(name, None)
            self.spent.discard(name)
        for key, count in Counter(key for _, key in forgotten).items():
            del self.by_key[key][:count]  # the oldest
            if not self.by_key[key]:
                del self.by_key[key]
        self.log.path(oldest).unlink(missing_ok=True)

    def close(self) -> None:
        self.closed = True
        self.log.close()


def _completions(path: Path) -> Iterator[tuple[Header, Completion]]:
    """The completions of a segment, up to the first that a power failure or a killed server left damaged."""
    with contextlib.suppress(DamagedRecordError, msgspec.DecodeError):
        for header, payload in records(path, FORMAT):
            yield header, msgspec.msgpack.decode(payload, type=Completion)


def key_of(messages: Sequence[Mapping[str, Any]], content: str | None) -> bytes:
    """The key by which a completion is found when its id is not known: a hash of all in the messages that a chat
    template may use, and of the answer. Empty: they are nested too deeply, and it is found by its id alone."""
    conversation = [{**message, "content": _text(message.get("content")), "weight": None} for message in messages]
    return _hash([conversation, content or ""])


def key_of_tools(tools: Sequence[Mapping[str, Any]] | None) -> bytes:
    """A hash of the tools that a chat template gets. Empty: there are none, or they are nested too deeply."""
    return _hash(tools) if tools else b""


def _hash(value: Any) -> bytes:
    try:
        return blake2b(msgspec.json.encode(_without_empty(value), order="deterministic"), digest_size=16).digest()
    except RecursionError:
        return b""


def _without_empty(value: Any) -> Any:
    """A value without null and empty fields: a client that repeats a message may leave out or add some of them."""
    if isinstance(value, Mapping):
        return {key: _without_empty(one) for key, one in value.items() if one not in (None, [], {})}
    return [_without_empty(one) for one in value] if isinstance(value, list | tuple) else value


def _text(content: Any) -> Any:
    """A message's content; parts of text are joined."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def packed_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return array("i", ids).tobytes()


def packed_floats(values: Sequence[float]) -> bytes:
    """Numbers as little-endian float32."""
    return array("f", values).tobytes()
