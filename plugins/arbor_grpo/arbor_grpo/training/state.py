"""What a GRPO trainer keeps beside its weights, and how it says where it stands."""

from __future__ import annotations

import msgspec

from arbor_core import CheckpointRequest

PLACE = "inbox.json"
"""File in a checkpoint: where in the inbox to go on."""


REFERENCE = "reference.safetensors"
"""File in a checkpoint: the reference model, where it moves."""


class Place(msgspec.Struct):
    """How far the inbox was used."""

    position: int = 0
    handled: int = 0
    """Groups that were trained on or skipped."""
    tokens: int = 0
    """Of all sequences that were trained on."""


class Finished(Exception):
    """Raised where training is to end now, and end well."""


class Wanted(msgspec.Struct):
    """What is asked of the run; rank 0 reads it and all ranks do it."""

    stop: str | None = None
    finish: bool = False
    names: tuple[CheckpointRequest, ...] = ()
