"""Uploads in parts without HTTP: begun, filled, completed or given up. One of another owner does not exist: 404."""

from __future__ import annotations

from collections.abc import Sequence

from arbor_core import ids
from arbor_core.config.api_keys import DEFAULT_OWNER
from arbor_core.files.uploads import UploadRow, Uploads, require_pending
from arbor_core.files.writer import Incoming
from arbor_core.types import not_found

from . import objects


class UploadService:
    """The uploads of a server."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads, self.limits = uploads, uploads.limits

    async def create(
        self, filename: str, size: int, purpose: str, owner: str = DEFAULT_OWNER, lifetime: int | None = None
    ) -> objects.Upload:
        """Begin to upload a file of `size` bytes, which is kept for `lifetime` seconds once it is there.

        Raises:
            ApiError: it is too large, or there is no room for it.
        """
        return self.show(await self.uploads.create(owner, filename, size, purpose, lifetime))

    async def pending(self, upload_id: str, owner: str = DEFAULT_OWNER) -> UploadRow:
        """An upload that takes parts.

        Raises:
            ApiError: 404; or it is completed, cancelled or expired.
        """
        await self.uploads.expire()
        upload = self.find(upload_id, owner)
        require_pending(upload)
        return upload

    def incoming(self) -> Incoming:
        """A place for a part that comes piece by piece, which `add` then keeps."""
        return self.uploads.incoming()

    async def add(self, upload: UploadRow, part: Incoming) -> objects.UploadPart:
        """Keep a part that has come in whole.

        Raises:
            ApiError: the upload takes no more.
        """
        return objects.part_object(await self.uploads.add(upload, part))

    async def complete(
        self, upload_id: str, part_ids: Sequence[str], md5: str | None = None, owner: str = DEFAULT_OWNER
    ) -> objects.Upload:
        """Join parts, in this order, into the file.

        Raises:
            ApiError: 404; the parts are not those of the file; or there is no room.
        """
        return self.show(await self.uploads.complete(self.find(upload_id, owner), part_ids, md5))

    async def cancel(self, upload_id: str, owner: str = DEFAULT_OWNER) -> objects.Upload:
        """Give an upload up.

        Raises:
            ApiError: 404; or it is completed or expired.
        """
        return self.show(await self.uploads.cancel(self.find(upload_id, owner)))

    def show(self, upload: UploadRow) -> objects.Upload:
        """The upload as OpenAI's object, with its file if that is there."""
        file = self.uploads.files.get(upload.file_id, upload.owner) if upload.file_id else None
        return objects.upload_object(upload, file)

    def find(self, upload_id: str, owner: str = DEFAULT_OWNER) -> UploadRow:
        """An upload of an owner's.

        Raises:
            ApiError: 404.
        """
        upload = self.uploads.get(ids.require(upload_id, "upload", "upload_not_found", "upload_id"), owner)
        if upload is None:
            raise not_found("upload", upload_id, "upload_not_found", "upload_id")
        return upload
