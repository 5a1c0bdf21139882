"""`/v1/uploads`: upload a file in parts, each of which may be sent again."""

from __future__ import annotations

from typing import Annotated, Literal

from litestar import post
from msgspec import Meta, Struct

from arbor_core.application import objects
from arbor_core.application.file_service import LIFETIME
from arbor_core.application.system import Arbor
from arbor_core.files.repository import PURPOSES
from arbor_core.server.http.auth import TRAIN
from arbor_core.server.http.multipart import PART_FORM, receive_part
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, body

UPLOADS = "/v1/uploads"
UPLOAD = UPLOADS + "/{upload_id:str}"


class ExpiresAfter(Struct, forbid_unknown_fields=True):
    """How long the file is to be kept, from its completion on."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=LIFETIME[0], le=LIFETIME[1])]


class CreateUploadRequest(Struct, forbid_unknown_fields=True):
    """The body. `mime_type` is OpenAI's: whatever it says, the bytes are kept as they come."""

    bytes: Annotated[int, Meta(ge=1)]
    filename: str
    mime_type: str
    purpose: Literal[PURPOSES]  # type: ignore[valid-type]
    expires_after: ExpiresAfter | None = None


class CompleteUploadRequest(Struct, forbid_unknown_fields=True):
    """The body: every part of the file once, in its order; `md5` of the whole, in hexadecimal digits."""

    part_ids: list[str]
    md5: str | None = None


@post(
    UPLOADS,
    operation_id="createUpload",
    status_code=200,
    opt=described("Begin to upload a file in parts.", body=CreateUploadRequest, scopes=TRAIN),
)
async def create_upload(request: AnyRequest, arbor: Arbor, owner: str) -> objects.Upload:
    new = await body(request, CreateUploadRequest, arbor.settings.limits.upload_idle_seconds)
    lifetime = new.expires_after.seconds if new.expires_after else None
    return await arbor.upload_service.create(new.filename, new.bytes, new.purpose, owner, lifetime)


@post(
    f"{UPLOAD}/parts",
    operation_id="addUploadPart",
    status_code=200,
    request_max_body_size=None,
    opt=described("Send a part, of up to 64 MB.", form=PART_FORM, scopes=TRAIN),
)
async def add_part(request: AnyRequest, upload_id: str, arbor: Arbor, owner: str) -> objects.UploadPart:
    upload = await arbor.upload_service.pending(upload_id, owner)
    return await receive_part(request, arbor.upload_service, upload)


@post(
    f"{UPLOAD}/complete",
    operation_id="completeUpload",
    status_code=200,
    opt=described("Join the parts, in the order given, into a file.", body=CompleteUploadRequest, scopes=TRAIN),
)
async def complete_upload(request: AnyRequest, upload_id: str, arbor: Arbor, owner: str) -> objects.Upload:
    arbor.upload_service.find(upload_id, owner)  # before the body is read
    complete = await body(request, CompleteUploadRequest, arbor.settings.limits.upload_idle_seconds)
    return await arbor.upload_service.complete(upload_id, complete.part_ids, complete.md5, owner)


@post(
    f"{UPLOAD}/cancel",
    operation_id="cancelUpload",
    status_code=200,
    opt=described("Give an upload up; its parts are removed.", scopes=TRAIN),
)
async def cancel_upload(upload_id: str, arbor: Arbor, owner: str) -> objects.Upload:
    return await arbor.upload_service.cancel(upload_id, owner)


ROUTES = [create_upload, add_part, complete_upload, cancel_upload]
