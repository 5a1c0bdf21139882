"""`/v1/files`: upload, list, show, download and delete files."""

from __future__ import annotations

from urllib.parse import quote

from litestar import delete, get, post
from litestar.response import Stream

from arbor_core import ids
from arbor_core.application import objects
from arbor_core.application.system import Arbor
from arbor_core.files.repository import FileRow
from arbor_core.server import schemas
from arbor_core.server.http.auth import TRAIN
from arbor_core.server.http.multipart import FORM, receive
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, query
from arbor_core.types import not_found


@post(
    "/v1/files",
    operation_id="createFile",
    status_code=200,
    request_max_body_size=None,
    opt=described("Upload a file; it is written to disk as it comes.", form=FORM, scopes=TRAIN),
)
async def create_file(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FileObject:
    await arbor.files.expire()
    return objects.file_object(await receive(request, arbor.files, owner))


@get(
    "/v1/files",
    operation_id="listFiles",
    opt=described("List files, newest first.", query=schemas.FilePage, scopes=TRAIN),
)
async def list_files(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FileList:
    page = query(request, schemas.FilePage)
    after = objects.position(page.after, lambda file_id: arbor.files.seq(file_id, owner))
    await arbor.files.expire()
    rows = arbor.files.page(owner, page.limit + 1, after, purpose=page.purpose, ascending=page.order == "asc")
    data = [objects.file_object(row) for row in rows[: page.limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return objects.FileList(data, first, last, has_more=len(rows) > page.limit)


@get(
    "/v1/files/{file_id:str}",
    operation_id="retrieveFile",
    opt=described("Retrieve a file's description.", scopes=TRAIN),
)
async def retrieve_file(file_id: str, arbor: Arbor, owner: str) -> objects.FileObject:
    return objects.file_object(find(arbor, file_id, owner))


@delete(
    "/v1/files/{file_id:str}", operation_id="deleteFile", status_code=200, opt=described("Delete a file.", scopes=TRAIN)
)
async def delete_file(file_id: str, arbor: Arbor, owner: str) -> objects.Deleted:
    file = find(arbor, file_id, owner)
    await arbor.files.delete(file.id, owner)
    return objects.Deleted(file.id, "file")


@get(
    "/v1/files/{file_id:str}/content",
    operation_id="downloadFile",
    opt=described("Download a file.", content="application/octet-stream", scopes=TRAIN),
)
async def download_file(file_id: str, arbor: Arbor, owner: str) -> Stream:
    file = find(arbor, file_id, owner)
    await arbor.files.check(file)
    ascii_name = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in file.filename)
    disposition = f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(file.filename, safe='')}"
    headers = {
        "content-disposition": disposition,
        "content-length": str(file.bytes),
        "x-content-type-options": "nosniff",
    }
    return Stream(arbor.files.read(file), headers=headers, media_type="application/octet-stream")


def find(arbor: Arbor, file_id: str, owner: str) -> FileRow:
    """A file of the caller's.

    Raises:
        ApiError: 404.
    """
    file = arbor.files.get(ids.require(file_id, "file", "file_not_found"), owner)
    if file is None:
        raise not_found("file", file_id, "file_not_found")
    return file


ROUTES = [create_file, list_files, retrieve_file, delete_file, download_file]
