"""The inbox of a job's directory: what clients send to a trainer while it runs, in order of arrival.

`<job>/inbox/` is a log whose records are on the disk before they are read (`storage/synced_log.py`). A record is opaque
here; what its payload and number mean is the kind of input's (`Trainer.input`): a group of rollouts and its batch id
(`groups`), or a command and its number (`commands`). Records are never changed and never removed: the trainer is a
pure function of them.
"""

from __future__ import annotations

from pathlib import Path

from arbor_core.storage.synced_log import (
    FORMAT,
    HEADER_BYTES,
    POSITION,
    SYNCED,
    Entry,
    LogDamagedError,
    Place,
    SyncedLog,
    encoded,
    end_of,
    headers,
    places,
    read,
    segments,
    synced,
)

SEGMENT_BYTES = 64 << 20
"""A segment that has grown beyond it is followed by another."""

InboxDamagedError = LogDamagedError


class Inbox(SyncedLog):
    """The writing end: the server's. Records are on the disk when `append` returns."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open for appending; see `SyncedLog`."""
        super().__init__("inbox", folder, segment_bytes)


__all__ = [
    "FORMAT",
    "HEADER_BYTES",
    "POSITION",
    "SYNCED",
    "Entry",
    "Inbox",
    "InboxDamagedError",
    "Place",
    "encoded",
    "end_of",
    "headers",
    "places",
    "read",
    "segments",
    "synced",
]
