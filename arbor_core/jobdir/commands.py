"""Commands in a job's inbox: a record's number is the command's, its payload whatever the plugin made of it."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from arbor_core.types import Command

from . import inbox


def entry(payload: bytes, number: int, digest: int | None = None) -> inbox.Entry:
    """A command as it is appended. `digest`: 64 bits that stand for what the client sent; None: the payload's."""
    return inbox.Entry(number, digest_of(payload) if digest is None else digest, payload)


def digest_of(payload: bytes) -> int:
    """64 bits that stand for a payload."""
    return int.from_bytes(blake2b(payload, digest_size=8).digest(), "little")


def read(folder: Path, position: int) -> Command:
    """The command that begins at a position of the inbox.

    Raises:
        InboxDamagedError: no whole command begins there.
    """
    for place, payload in inbox.read(folder, position):
        return Command(place.number, payload, place.digest, place.start)
    raise inbox.InboxDamagedError(folder, position, "the log ends there")
