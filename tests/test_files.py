"""/v1/files against a real server. The ids `row-N` are rows of the table of bad inputs."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import openai
import pytest
from conftest import LiveServer, launch
from http_calls import MULTIPART, Answer, call, form, raw_socket

PURPOSE = ("purpose", b"fine-tune")
FILE = ("file", b"{}\n", "rows.jsonl")


def post(server: LiveServer, *parts: Any, headers: dict[str, str] | None = None) -> Answer:
    return call(server.url, "POST", "/v1/files", form(*parts), headers or MULTIPART)


def stored(server: LiveServer) -> set[str]:
    """Everything on the disk that uploads have left."""
    return {str(path) for path in (server.storage / "files").rglob("*") if path.is_file()}


def settled(server: LiveServer) -> set[str]:
    """What is stored once no upload is under way."""
    incoming, deadline = server.storage / "files" / ".incoming", time.monotonic() + 10
    while any(incoming.iterdir()):
        assert time.monotonic() < deadline, f"left behind: {list(incoming.iterdir())}"
        time.sleep(0.01)
    return stored(server)


def test_a_file_comes_back_as_it_went(server: LiveServer) -> None:
    content = bytes(range(256)) * 20_000
    before = int(time.time())
    file = server.client.files.create(file=("data.bin", content), purpose="fine-tune")
    assert re.fullmatch(r"file-[A-Za-z0-9]{24}", file.id)
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(content), "data.bin", "fine-tune")
    assert file.status == "processed"
    assert before <= file.created_at <= time.time()
    assert file.expires_at is None
    assert server.client.files.retrieve(file.id) == file
    assert server.client.files.wait_for_processing(file.id) == file
    assert server.client.files.content(file.id).read() == content
    deleted = server.client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert not (server.storage / "files" / file.id).exists()


def test_a_file_may_come_before_its_purpose(server: LiveServer) -> None:
    answer = post(server, FILE, PURPOSE)
    assert answer.status == 200
    assert answer.json["bytes"] == 3


def test_expiry(server: LiveServer) -> None:
    file = server.client.files.create(
        file=("a.jsonl", b"{}"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600


def test_lists_page_both_ways(server: LiveServer) -> None:
    ids = [server.upload(b"{}", purpose="user_data") for _ in range(5)]
    newest_first = [file.id for file in server.client.files.list(purpose="user_data", limit=2)]
    assert newest_first == ids[::-1]
    oldest_first = [file.id for file in server.client.files.list(purpose="user_data", limit=2, order="asc")]
    assert oldest_first == ids
    page = server.client.files.list(purpose="user_data", limit=2)
    assert (page.object, page.has_more, page.first_id, page.last_id) == ("list", True, ids[4], ids[3])
    server.client.files.delete(ids[3])
    after = server.client.files.list(purpose="user_data", after=ids[3])
    assert [file.id for file in after.data] == ids[2::-1], "a deleted file is still a place in the list"
    empty = call(server.url, "GET", "/v1/files?purpose=batch").json
    assert empty == {"data": [], "first_id": None, "last_id": None, "has_more": False, "object": "list"}


@pytest.mark.parametrize(
    "content",
    [pytest.param(b'\xef\xbb\xbf{"a": 1}\r\n\r\n\n{"b": 2}', id="row-4"), pytest.param(b"\xff\xfe\x00", id="row-5")],
)
def test_bytes_are_kept_as_they_are(server: LiveServer, content: bytes) -> None:
    assert server.client.files.content(server.upload(content)).read() == content


@pytest.mark.parametrize(
    ("parts", "code", "param"),
    [
        pytest.param([PURPOSE, ("file", b"", "a.jsonl")], "empty_file", "file", id="row-1"),
        pytest.param([FILE], "missing_required_parameter", "purpose", id="row-14-purpose"),
        pytest.param([PURPOSE], "missing_required_parameter", "file", id="row-14-file"),
        pytest.param([PURPOSE, ("file", b"text")], "missing_required_parameter", "file", id="row-14-text"),
        pytest.param([("purpose", b"world domination"), FILE], "invalid_value", "purpose", id="row-15"),
        pytest.param([PURPOSE, FILE, FILE], "duplicate_parameter", "file", id="row-17-file"),
        pytest.param([PURPOSE, PURPOSE, FILE], "duplicate_parameter", "purpose", id="row-17-purpose"),
        pytest.param([PURPOSE, ("colour", b"red"), FILE], "unknown_parameter", "colour", id="row-43"),
        pytest.param([("purpose", b"\xff"), FILE], "invalid_multipart", None, id="row-18-not-utf8"),
    ],
)
def test_forms_that_are_refused(server: LiveServer, parts: list[Any], code: str, param: str | None) -> None:
    before = stored(server)
    post(server, *parts).error(400, code, param)
    assert stored(server) == before


@pytest.mark.parametrize("seconds", ["3599", "2592001", "-1", "1e4", "", "9" * 5000, "٣٦٠٠"])
def test_row_28_expiry_out_of_bounds(server: LiveServer, seconds: str) -> None:
    expiry = [("expires_after[anchor]", b"created_at"), ("expires_after[seconds]", seconds.encode())]
    answer = post(server, PURPOSE, *expiry, FILE)
    if len(seconds) > 4096:
        answer.error(413, "field_too_large", "expires_after[seconds]")
    else:
        answer.error(400, "invalid_value", "expires_after[seconds]")


def test_row_28_anchor(server: LiveServer) -> None:
    parts = [("expires_after[anchor]", b"last_active_at"), ("expires_after[seconds]", b"3600")]
    post(server, PURPOSE, *parts, FILE).error(400, "invalid_value", "expires_after[anchor]")
    post(server, PURPOSE, parts[1], FILE).error(400, "missing_required_parameter", "expires_after[anchor]")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        pytest.param(form(PURPOSE, FILE), {"content-type": "multipart/form-data"}, 400, id="row-18-no-boundary"),
        pytest.param(form(PURPOSE, FILE), {"content-type": "application/json"}, 415, id="row-18-json"),
        pytest.param(form(PURPOSE, FILE), {}, 415, id="row-18-no-type"),
        pytest.param(form(PURPOSE, FILE)[:-12], MULTIPART, 400, id="row-18-truncated"),
        pytest.param(b"", MULTIPART, 400, id="row-18-empty"),
        pytest.param(b"not a form at all", MULTIPART, 400, id="row-18-text"),
        pytest.param(form(*((f"p{n}", b"") for n in range(100_000))), MULTIPART, 400, id="row-19-parts"),
        pytest.param(form((f"p{'x' * (1 << 20)}", b"")), MULTIPART, 400, id="row-19-header"),
    ],
)
def test_broken_multipart(server: LiveServer, body: bytes, headers: dict[str, str], status: int) -> None:
    before = stored(server)
    call(server.url, "POST", "/v1/files", body, headers).error(status, "invalid_multipart")
    assert settled(server) == before


NAMES = [
    pytest.param("../../etc/passwd", "passwd", id="row-12-dots"),
    pytest.param("..\\..\\x.jsonl", "x.jsonl", id="row-12-backslash"),
    pytest.param("/etc/passwd", "passwd", id="row-12-absolute"),
    pytest.param("%2e%2e%2fx", "%2e%2e%2fx", id="row-12-percent"),
    pytest.param("C:\\data\\x.jsonl", "x.jsonl", id="row-12-drive"),
    pytest.param("\u2024\u2024/x", "x", id="row-13-lookalike-dots"),
    pytest.param("a\uff0fb", "a\uff0fb", id="row-13-fullwidth-slash"),
    pytest.param("a\u202egpj.exe", "agpj.exe", id="row-13-rtl"),
    pytest.param("a\0b", "ab", id="row-13-nul"),
    pytest.param("e\u0301.jsonl", "é.jsonl", id="row-13-nfc"),
    pytest.param("", "upload", id="row-13-empty"),
    pytest.param("..", "upload", id="row-13-only-dots"),
    pytest.param("x" * 4000, "x" * 255, id="row-13-long"),
    pytest.param("é" * 200, "é" * 127, id="row-13-long-utf8"),
]


@pytest.mark.parametrize(("name", "shown"), NAMES)
def test_file_names_are_only_shown(server: LiveServer, name: str, shown: str) -> None:
    answer = post(server, PURPOSE, ("file", b"{}", name))
    assert answer.status == 200, answer.body
    assert answer.json["filename"] == shown
    path = server.storage / "files" / answer.json["id"]
    assert path.read_bytes() == b"{}"
    assert {p.name for p in server.storage.parent.iterdir()} <= {"data", "home", "server.log"}
    content = call(server.url, "GET", f"/v1/files/{answer.json['id']}/content")
    disposition = content.headers["content-disposition"]
    assert disposition.isascii()
    assert unquote(disposition.partition("filename*=UTF-8''")[2]) == shown


@pytest.mark.parametrize("name", ['x"; a="b', "x\r\nset-cookie: a=b", "x%22.jsonl"])
def test_row_13_a_name_cannot_add_headers(server: LiveServer, name: str) -> None:
    file = server.client.files.create(file=(name, b"{}"), purpose="fine-tune")
    content = call(server.url, "GET", f"/v1/files/{file.id}/content")
    assert "set-cookie" not in content.headers
    assert unquote(content.headers["content-disposition"].partition("filename*=UTF-8''")[2]) == file.filename


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that takes small files only, and gives up quickly."""
    live = launch(tmp_path_factory.mktemp("small"), "limits.upload_bytes=1000000", "limits.upload_idle_seconds=0.5")
    yield live
    live.stop()


def test_row_9_content_length_above_the_limit(small: LiveServer) -> None:
    headers = {**MULTIPART, "content-length": str(10 << 30)}
    with raw_socket(small.url) as connection:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(f"POST /v1/files HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode())
        answer = connection.makefile("rb").read()  # nothing of the body is sent: the answer does not wait for it
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"file_too_large"' in answer


def test_row_9_the_client_hears_it(small: LiveServer) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        small.new_client(max_retries=2).files.create(file=("a", b"x" * 50_000_000), purpose="fine-tune")
    assert caught.value.status_code == 413
    assert caught.value.code == "file_too_large"
    assert settled(small) == set()


def test_the_limit_is_exact(small: LiveServer) -> None:
    file = small.client.files.create(file=("a", b"x" * 1_000_000), purpose="fine-tune")
    small.client.files.delete(file.id)
    with pytest.raises(openai.APIStatusError, match="1000000 bytes"):
        small.client.files.create(file=("a", b"x" * 1_000_001), purpose="fine-tune")
    assert settled(small) == set()


def endless(head: bytes, count: int) -> Iterable[bytes]:
    yield head
    for _ in range(count):
        yield b"x" * 65536


@pytest.mark.parametrize(
    ("name", "filename", "code"),
    [
        pytest.param("file", '; filename="a"', b'"code":"file_too_large"', id="row-10"),
        pytest.param("purpose", "", b'"code":"field_too_large"', id="row-11"),
    ],
)
def test_a_body_without_end(small: LiveServer, name: str, filename: str, code: bytes) -> None:
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode()
    sent = 0
    with raw_socket(small.url) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
            b"content-type: multipart/form-data; boundary=XX\r\n\r\n"
        )
        try:
            for chunk in endless(head, 10_000):
                connection.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                sent += len(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = received(connection)
    assert sent < 100_000_000, "the server went on reading"
    assert answer.startswith(b"HTTP/1.1 413")
    assert code in answer
    assert settled(small) == set()


def received(connection: Any) -> bytes:
    """All that is left to read, also of a connection that was reset behind it."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def test_row_20_a_client_that_goes_away(server: LiveServer) -> None:
    before = stored(server)
    with raw_socket(server.url) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
            b"content-type: multipart/form-data; boundary=XX\r\n\r\n" + form(PURPOSE, FILE)[:-12]
        )
        incoming, deadline = server.storage / "files" / ".incoming", time.monotonic() + 10
        while not any(incoming.iterdir()):
            assert time.monotonic() < deadline, "the upload has not begun"
            time.sleep(0.01)
    assert settled(server) == before


def test_row_21_a_client_that_stops_sending(small: LiveServer) -> None:
    with raw_socket(small.url) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
            b"content-type: multipart/form-data; boundary=XX\r\n\r\n" + form(PURPOSE, FILE)[:-12]
        )
        assert small.client.files.list().data == [], "another client is served meanwhile"
        answer = connection.makefile("rb").read()  # ends when the server closes the connection
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"x-should-retry: false" in answer
    assert settled(small) == set()


def test_row_22_unfinished_uploads_are_swept(tmp_path: Path, start_server: Callable[..., LiveServer]) -> None:
    server = start_server()
    kept = server.upload(b"{}\n")
    server.stop()
    left = server.storage / "files" / ".incoming" / "0123.part"
    left.write_bytes(b"half a fi")
    again = start_server()
    assert not left.exists()
    assert again.client.files.content(kept).read() == b"{}\n"


def test_row_24_a_disk_that_is_full(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(f"limits.free_bytes={1 << 60}")
    answer = post(server, PURPOSE, FILE)
    answer.error(507, "insufficient_storage")
    assert answer.headers["x-should-retry"] == "false"
    assert settled(server) == set()


@pytest.mark.parametrize(
    ("content", "status", "code", "param"),
    [
        pytest.param(b'{"z": 1}', 500, "file_corrupted", None, id="row-25-other-bytes"),
        pytest.param(b"", 500, "file_corrupted", None, id="row-25-truncated"),
        pytest.param(None, 404, "file_not_found", "id", id="row-25-missing"),
    ],
)
def test_a_damaged_file(server: LiveServer, content: bytes | None, status: int, code: str, param: str | None) -> None:
    original = b'{"a": 1}'
    file_id = server.upload(original)
    path = server.storage / "files" / file_id
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(original).digest()
    path.unlink() if content is None else path.write_bytes(content)
    answer = call(server.url, "GET", f"/v1/files/{file_id}/content")
    answer.error(status, code, param)
    if status == 500:
        assert answer.headers["x-should-retry"] == "false"
    assert server.client.files.retrieve(file_id).status == "error"


def test_row_26_a_file_that_a_job_needs(server: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    file = server.upload(chat_rows)
    job = server.client.fine_tuning.jobs.create(
        model="mock/tiny",
        training_file=file,
        method={"type": "supervised", "supervised": {"hyperparameters": {"fault": "hang"}}},  # type: ignore[typeddict-unknown-key]
    )
    call(server.url, "DELETE", f"/v1/files/{file}").error(400, "file_in_use")
    assert server.client.files.retrieve(file).id == file
    server.client.fine_tuning.jobs.cancel(job.id)
    server.wait(job.id, "cancelled")
    assert server.client.files.delete(file).deleted


def test_row_27_deleting_twice(server: LiveServer) -> None:
    file_id = server.upload(b"{}")
    server.client.files.delete(file_id)
    call(server.url, "DELETE", f"/v1/files/{file_id}").error(404, "file_not_found", "id")
    call(server.url, "GET", f"/v1/files/{file_id}").error(404, "file_not_found", "id")
    call(server.url, "GET", f"/v1/files/{file_id}/content").error(404, "file_not_found", "id")
