"""Files made of others, one after the other: joined within the kernel where it can, and hashed once."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import msgspec

COPY_BYTES = 1 << 26
"""Bytes that the kernel is asked to copy at once."""
PIECE_BYTES = 1 << 20
UNABLE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What `copy_file_range` says where the system or the file system does not have it."""


class Joined(msgspec.Struct, frozen=True):
    """What came of it. Digests are in hexadecimal digits."""

    bytes: int
    sha256: str
    md5: str | None


def join(parts: Sequence[Path], target: Path, *, md5: bool) -> Joined:
    """Write a new file that is durable, under a name that may be lost; on an error there is none. `md5`: whether that
    digest is wanted too.

    Raises:
        OSError: a part is not there, the target is, or the disk is full.
    """
    with FileIO(target, "x+") as whole:
        try:
            for part in parts:
                append(part, whole)
            size = whole.tell()
            digests = hashed(whole, md5=md5)
            os.fsync(whole.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return Joined(size, *digests)


def append(part: Path, whole: FileIO) -> None:
    """Append a part, within the kernel if it can: some file systems then share the blocks."""
    with FileIO(part) as source:
        try:
            while os.copy_file_range(source.fileno(), whole.fileno(), COPY_BYTES):
                pass
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in UNABLE:
                raise
            while piece := source.read(PIECE_BYTES):  # from where it got to
                rest = memoryview(piece)
                while rest:
                    rest = rest[whole.write(rest) :]


def hashed(whole: FileIO, *, md5: bool) -> tuple[str, str | None]:
    """SHA-256 and, if wanted, MD5 of a file."""
    sha256, other = hashlib.sha256(), hashlib.md5(usedforsecurity=False) if md5 else None
    whole.seek(0)
    while piece := whole.read(PIECE_BYTES):
        sha256.update(piece)
        if other:
            other.update(piece)
    return sha256.hexdigest(), other.hexdigest() if other else None
