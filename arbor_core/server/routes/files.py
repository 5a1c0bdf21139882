"""`/v1/files`: upload, list, show, download and delete files."""

from __future__ import annotations

from urllib.parse import quote

from litestar import delete, get, post
from litestar.response import Stream

from arbor_core.application import objects
from arbor_core.application.system import Arbor
from arbor_core.server import schemas
from arbor_core.server.http.auth import TRAIN
from arbor_core.server.http.multipart import FORM, receive
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, query


@post(
    "/v1/files",
    operation_id="createFile",
    status_code=200,
    request_max_body_size=None,
    opt=described("Upload a file; it is written to disk as it comes.", form=FORM, scopes=TRAIN),
)
async def create_file(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FileObject:
    return await receive(request, arbor.file_service, owner)


@get(
    "/v1/files",
    operation_id="listFiles",
    opt=described("List files, newest first.", query=schemas.FilePage, scopes=TRAIN),
)
async def list_files(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FileList:
    page = query(request, schemas.FilePage)
    ascending = page.order == "asc"
    return await arbor.file_service.list_files(owner, page.limit, page.after, purpose=page.purpose, ascending=ascending)


@get(
    "/v1/files/{file_id:str}",
    operation_id="retrieveFile",
    opt=described("Retrieve a file's description.", scopes=TRAIN),
)
async def retrieve_file(file_id: str, arbor: Arbor, owner: str) -> objects.FileObject:
    return arbor.file_service.show(file_id, owner)


@delete(
    "/v1/files/{file_id:str}", operation_id="deleteFile", status_code=200, opt=described("Delete a file.", scopes=TRAIN)
)
async def delete_file(file_id: str, arbor: Arbor, owner: str) -> objects.Deleted:
    return await arbor.file_service.delete(file_id, owner)


@get(
    "/v1/files/{file_id:str}/content",
    operation_id="downloadFile",
    opt=described("Download a file.", content="application/octet-stream", scopes=TRAIN),
)
async def download_file(file_id: str, arbor: Arbor, owner: str) -> Stream:
    file, content = await arbor.file_service.content(file_id, owner)
    ascii_name = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in file.filename)
    disposition = f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(file.filename, safe='')}"
    headers = {
        "content-disposition": disposition,
        "content-length": str(file.bytes),
        "x-content-type-options": "nosniff",
    }
    return Stream(content, headers=headers, media_type="application/octet-stream")


ROUTES = [create_file, list_files, retrieve_file, delete_file, download_file]
