"""Losing a device: how libraries say so, and which of a job's devices it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from .types import Device

CODE = "device_lost"
"""The error's code, and the name of the file in which a rank leaves word."""
SAID = ("gpu is lost", "fallen off the bus", "uncorrectable ecc error", "uncorrectable nvlink error")
"""In the words of NVML and of CUDA's runtime. What may also be a program's own mistake (`unknown error`, `unspecified
launch failure`) is not among them."""


class Word(msgspec.Struct):
    """What a process says that lost a device."""

    devices: list[str]
    """Ids. One that uses several cannot tell which of them it was."""
    message: str


def is_lost(error: BaseException) -> bool:
    """Whether a device that has gone is behind an error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError | OSError) and any(words in str(seen).lower() for words in SAID):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def leave_word(attempt_dir: Path, devices: Sequence[Device], message: str) -> None:
    """Say what happened, in any rank: what the first one reports may only follow from it."""
    word = Word([device.id for device in devices], message)
    (attempt_dir / CODE).write_bytes(msgspec.json.encode(word))


def left_word(attempt_dir: Path) -> Word | None:
    """What a rank said that lost its device, if one did."""
    try:
        return msgspec.json.decode((attempt_dir / CODE).read_bytes(), type=Word)
    except (FileNotFoundError, msgspec.DecodeError):  # or it was killed while it said so
        return None
