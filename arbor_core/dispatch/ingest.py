"""What an attempt has written on its way into the database."""

from __future__ import annotations

import msgspec

from arbor_core.types import Event, Exit

BATCH = 500
"""Events per transaction."""


class Seen(msgspec.Struct):
    """What an attempt's files say."""

    ended: Exit | None
    """How it ended; None while its keeper has not said so."""
    events: list[Event]
    """Those that nobody has taken yet."""
    offset: int
    """Where the next ones begin."""
