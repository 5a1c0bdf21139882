"""Files without HTTP: put in, found, listed, shown, read and deleted. A file of another owner does not exist: 404."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from arbor_core import ids
from arbor_core.config.api_keys import DEFAULT_OWNER
from arbor_core.files.repository import PURPOSES, FileRow, Files
from arbor_core.files.writer import BATCH_BYTES, Incoming
from arbor_core.types import ApiError, not_found

from . import objects

LIFETIME = (3600, 2_592_000)
"""Seconds between which the lifetime of a file must be."""


class FileService:
    """The files of a server."""

    def __init__(self, files: Files) -> None:
        self.files, self.limits = files, files.limits

    async def create(
        self,
        content: bytes | Path,
        filename: str | None = None,
        purpose: str = "fine-tune",
        owner: str = DEFAULT_OWNER,
        lifetime: int | None = None,
    ) -> objects.FileObject:
        """Put a file in; it is durable when this returns.

        Args:
            content: Its bytes, or a file to copy them from.
            filename: What it is called; default: as the file that it is copied from.
            lifetime: Seconds after which it is deleted; None: it stays.

        Raises:
            ApiError: it is empty or too large, the purpose or the lifetime cannot be, or there is no room for it.
        """
        if purpose not in PURPOSES:
            message = f"Invalid 'purpose': '{purpose}' is not one of {', '.join(PURPOSES)}."
            raise ApiError(400, message, "invalid_value", "purpose")
        if lifetime is not None and not LIFETIME[0] <= lifetime <= LIFETIME[1]:
            message = f"Invalid 'lifetime': expected an integer from {LIFETIME[0]} to {LIFETIME[1]}."
            raise ApiError(400, message, "invalid_value", "lifetime")
        await self.expire()
        async with self.incoming() as part:
            async for piece in pieces(content):
                await part.write(piece)
            if part.bytes == 0:
                raise ApiError(400, "'file' is empty.", "empty_file", "file")
            name = filename or (content.name if isinstance(content, Path) else "upload")
            return await self.commit(part, owner, name, purpose, lifetime)

    async def expire(self) -> None:
        """Delete what has passed its lifetime."""
        await self.files.expire()

    def incoming(self) -> Incoming:
        """A place for a file that comes piece by piece: `async with service.incoming() as part`, then `commit`."""
        return self.files.incoming()

    async def commit(
        self, part: Incoming, owner: str, filename: str, purpose: str, lifetime: int | None
    ) -> objects.FileObject:
        """Keep a file that has come in whole."""
        return objects.file_object(await self.files.commit(part, owner, filename, purpose, lifetime))

    def find(self, file_id: str, owner: str = DEFAULT_OWNER) -> FileRow:
        """A file of an owner's.

        Raises:
            ApiError: 404.
        """
        file = self.files.get(ids.require(file_id, "file", "file_not_found"), owner)
        if file is None:
            raise not_found("file", file_id, "file_not_found")
        return file

    def show(self, file_id: str, owner: str = DEFAULT_OWNER) -> objects.FileObject:
        """A file as OpenAI's object.

        Raises:
            ApiError: 404.
        """
        return objects.file_object(self.find(file_id, owner))

    async def list_files(
        self,
        owner: str = DEFAULT_OWNER,
        limit: int = 10_000,
        after: str | None = None,
        *,
        purpose: str | None = None,
        ascending: bool = False,
    ) -> objects.FileList:
        """A page of an owner's files, newest first unless `ascending`.

        Args:
            after: The id of the last file of the page before; it may have been deleted since.

        Raises:
            ApiError: `after` is no file of the owner's.
        """
        position = objects.position(after, lambda file_id: self.files.seq(file_id, owner))
        await self.expire()
        rows = self.files.page(owner, limit + 1, position, purpose=purpose, ascending=ascending)
        data = [objects.file_object(row) for row in rows[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return objects.FileList(data, first, last, has_more=len(rows) > limit)

    async def content(self, file_id: str, owner: str = DEFAULT_OWNER) -> tuple[FileRow, AsyncIterator[bytes]]:
        """A file, and its bytes in pieces.

        Raises:
            ApiError: 404; or its bytes are not those that came.
        """
        file = self.find(file_id, owner)
        await self.files.check(file)
        return file, self.files.read(file)

    async def delete(self, file_id: str, owner: str = DEFAULT_OWNER) -> objects.Deleted:
        """Delete a file.

        Raises:
            ApiError: 404; or a job that has not ended needs it.
        """
        file = self.find(file_id, owner)
        await self.files.delete(file.id, owner)
        return objects.Deleted(file.id, "file")


async def pieces(content: bytes | Path) -> AsyncIterator[bytes]:
    """Bytes, a batch at a time."""
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(BATCH_BYTES):
            yield piece
