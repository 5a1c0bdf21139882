"""`failure-<code>.json` of an attempt's directory: why a rank died. What rank 0 reports may only follow."""

from __future__ import annotations

from pathlib import Path

import msgspec

DEVICE_LOST = "device_lost"
OUT_OF_MEMORY = "out_of_memory"
CODES = (DEVICE_LOST, OUT_OF_MEMORY)
"""The codes of errors that any rank notes, the weightiest first."""


class FailureNote(msgspec.Struct):
    """What a rank says of its end."""

    code: str
    message: str
    devices: list[str] = []
    """Ids of the devices that were lost. A rank that uses several cannot tell which of them it was."""


def write_note(attempt_dir: Path, note: FailureNote) -> None:
    """Say in any rank why it ends."""
    (attempt_dir / f"failure-{note.code}.json").write_bytes(msgspec.json.encode(note))


def read_note(attempt_dir: Path) -> FailureNote | None:
    """The weightiest note that a rank left; None: there is none."""
    for code in CODES:
        try:
            return msgspec.json.decode((attempt_dir / f"failure-{code}.json").read_bytes(), type=FailureNote)
        except (FileNotFoundError, msgspec.DecodeError):  # or it was killed while it wrote
            continue
    return None
