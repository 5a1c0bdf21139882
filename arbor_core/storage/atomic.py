"""Small files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

from arbor_core.crash_points import crash_point


def replace(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        durable: Wait until it is on the disk, so that this holds after a power failure too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    crash_point("file.written")
    temporary.replace(path)
    crash_point("file.renamed")
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new, renamed and removed entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
