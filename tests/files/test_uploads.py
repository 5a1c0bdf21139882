"""Uploads as they should not be, against a real server. The ids `row-N` are rows of the table of bad inputs."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

import openai
import pytest
from http_calls import FILE, JOBS, MULTIPART, PURPOSE, call, form, post, raw_socket, settled, stored
from live import LiveServer, launch


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
        connection.sendall(f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\n{head}\r\n".encode())
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
            b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
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
            b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n"
            b"content-type: multipart/form-data; boundary=XX\r\n\r\n" + form(PURPOSE, FILE)[:-12]
        )
        incoming, deadline = server.storage / "files" / ".incoming", time.monotonic() + 120
        while not any(incoming.iterdir()):
            assert time.monotonic() < deadline, "the upload has not begun"
            time.sleep(0.01)
    assert settled(server) == before


@pytest.mark.parametrize("path", [JOBS, "/v1/chat/completions", "/v1/completions"])
def test_row_21_a_json_body_that_stops_coming(small: LiveServer, path: str) -> None:
    with raw_socket(small.url) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{{".encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in answer and b"x-should-retry: false" in answer


def test_row_21_a_client_that_stops_sending(small: LiveServer) -> None:
    with raw_socket(small.url) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n"
            b"content-type: multipart/form-data; boundary=XX\r\n\r\n" + form(PURPOSE, FILE)[:-12]
        )
        assert small.client.files.list().data == [], "another client is served meanwhile"
        answer = connection.makefile("rb").read()  # ends when the server closes the connection
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"x-should-retry: false" in answer
    assert settled(small) == set()


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads/{}/parts"])
def test_row_21_a_client_that_sends_a_byte_now_and_then(small: LiveServer, path: str) -> None:
    upload = small.client.uploads.create(bytes=9, filename="a", mime_type="text/plain", purpose="fine-tune")
    field = "file" if path == "/v1/files" else "data"
    head = form(PURPOSE, ("file", b"", "a")) if field == "file" else form(("data", b"", "a"))
    with raw_socket(small.url) as connection:
        connection.sendall(
            f"POST {path.format(upload.id)} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n"
            "content-type: multipart/form-data; boundary=XX\r\n\r\n".encode()
            + head[:-12]
        )
        began = time.monotonic()
        while not select.select([connection], [], [], 0.02)[0]:  # until it answers
            assert time.monotonic() - began < 120, "the upload is still open"
            connection.sendall(b"x")
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"limits.upload_bytes_per_second" in answer and b"x-should-retry: false" in answer
    assert settled(small) == set()


def test_row_21_a_slow_client_is_heard_out(small: LiveServer) -> None:
    """Above the rate that is asked for, over several windows."""
    body = form(PURPOSE, ("file", b"x" * 6000, "a"))
    with raw_socket(small.url) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
            "content-type: multipart/form-data; boundary=XX\r\n\r\n".encode()
        )
        for at in range(0, len(body), 100):
            assert not select.select([connection], [], [], 0.02)[0], "it was given up"
            connection.sendall(body[at : at + 100])
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    small.client.files.delete(json.loads(answer.partition(b"\r\n\r\n")[2])["id"])
