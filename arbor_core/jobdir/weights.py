"""`weights/<version>-<attempt>/` of a job's directory: policies for engines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arbor_core.crash_points import crash_point

KEPT = 4
"""Published versions that stay on the disk: engines load a version soon after it was published, or never."""


@contextmanager
def publishing(folder: Path, name: str) -> Iterator[Path]:
    """Yield a directory to write a version into; it is `folder/name` when the block ends. Older ones go.

    Not synced: after a power failure the trainer publishes again from its checkpoint.
    """
    temporary = folder / f"{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        crash_point("weights.written")
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        crash_point("weights.renamed")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(folder.iterdir(), key=_newness, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _newness(path: Path) -> tuple[int, int]:
    """Version and attempt. The newest version is served, though an attempt that began before it publishes again."""
    version, _, attempt = path.name.removesuffix(".tmp").partition("-")
    return int(version), int(attempt)
