"""A file on its way to the disk: hashed and written as it comes, durable before it has a name, gone when given up."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from arbor_core.crash_points import crash_point
from arbor_core.storage.atomic import TEMPORARY, sync_folder
from arbor_core.types import CLOSE, NO_RETRY, ApiError

BATCH_BYTES = 1 << 20
"""Bytes that go to the disk at once."""


class Incoming:
    """One file on its way in. Hashing and writing happen on a thread, at most one batch behind the network.

    Leaving the `async with` block without `settle` removes every trace.
    """

    def __init__(self, folder: Path, most: int, reserve: int, param: str = "file") -> None:
        """`most`: bytes that it may have. `reserve`: bytes that must stay free. `param`: what a client calls it."""
        self.folder, self.most, self.reserve, self.param = folder, most, reserve, param
        self.path = folder / f"{uuid.uuid4().hex}{TEMPORARY}"
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._batch: list[bytes] = []
        self._batched = 0
        self._writing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        self.require_room(0)
        self._file = self.path.open("xb", buffering=0)
        crash_point("upload.opened")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing:
            await asyncio.gather(self._writing, return_exceptions=True)  # its error, if any, was raised already
        self._file.close()
        self.path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(str(error)) from error

    def require_room(self, size: int) -> None:
        """Refuse an upload of `size` bytes that is too large, or that would fill the disk.

        Raises:
            ApiError: 413 or 507.
        """
        if size > self.most:
            raise too_large(self.most, self.param)
        require_room(self.folder, size, self.reserve)

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            ApiError: the file has become too large.
        """
        self.bytes += len(chunk)
        if self.bytes > self.most:
            self.require_room(self.bytes)
        self._batch.append(chunk)
        self._batched += len(chunk)
        if self._batched >= BATCH_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        if self._writing:
            await self._writing
        data, self._batch, self._batched = b"".join(self._batch), [], 0
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._store, data)

    def _store(self, data: bytes) -> None:
        self._hash.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    async def settle(self, target: Path) -> str:
        """Make the file durable under its final name; returns its SHA-256."""
        await self._flush()
        if self._writing:
            await self._writing
        await asyncio.to_thread(self._settle, target)
        return self._hash.hexdigest()

    def _settle(self, target: Path) -> None:
        os.fsync(self._file.fileno())
        crash_point("upload.written")
        self.path.rename(target)
        crash_point("upload.renamed")
        sync_folder(target.parent)


def too_large(most: int, param: str) -> ApiError:
    message = f"'{param}' has more than {most} bytes, the most this server takes."
    return ApiError(413, message, "file_too_large", param, CLOSE)


def require_room(folder: Path, size: int, reserve: int) -> None:
    """Refuse `size` bytes that would leave less than `reserve` on the disk.

    Raises:
        ApiError: 507.
    """
    if shutil.disk_usage(folder).free - size < reserve:
        raise no_room(f"{reserve} bytes must stay free (limits.free_bytes)")


def no_room(reason: str) -> ApiError:
    message = f"There is not enough disk space for this file: {reason}. Delete files that are no longer needed."
    return ApiError(507, message, "insufficient_storage", headers=NO_RETRY | CLOSE)
