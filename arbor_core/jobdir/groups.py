"""Groups of rollouts in a job's inbox: a record's payload is a msgpack `Group`, its number the batch id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from arbor_core.types import Group, Record

from . import inbox


def entry(group: Group, digest: int) -> inbox.Entry:
    """A group as it is appended. `digest`: 64 bits that stand for what the client sent."""
    return inbox.Entry(group.id, digest, msgspec.msgpack.encode(group))


def read(folder: Path, position: int, until: int | None = None) -> Iterator[Record]:
    """The groups of an inbox from `position` on; ends at `until`, or where the log ends now.

    Raises:
        InboxDamagedError: a record is not what was written.
    """
    for place, payload in inbox.read(folder, position, until):
        try:
            group = msgspec.msgpack.decode(payload, type=Group)
        except msgspec.DecodeError as error:
            raise inbox.InboxDamagedError(folder, place.start, str(error)) from None
        yield Record(place.start, place.end, place.crc, place.digest, group)
