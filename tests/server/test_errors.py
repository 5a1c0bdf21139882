"""Whatever is wrong with a request, the answer is OpenAI's envelope, in full, with a request id."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing

import openai
import pytest
from http_calls import call, raw_socket
from live import LiveServer, launch

from arbor_core.types import ArborError

JSON_ROUTES = ["/v1/fine_tuning/jobs", "/v1/chat/completions", "/v1/completions"]

BODIES = [
    pytest.param(b"", id="row-38-empty"),
    pytest.param(b"{", id="row-38-malformed"),
    pytest.param(b"[]", id="row-38-array"),
    pytest.param(b"null", id="row-38-null"),
    pytest.param(b'"text"', id="row-38-text"),
    pytest.param(b"{} {}", id="row-38-two"),
    pytest.param(b"[" * 200_000, id="row-39-deep"),
    pytest.param(b'{"a":' * 200_000, id="row-39-deep-objects"),
    pytest.param(b'{"model": "\xff"}', id="row-39-not-utf8"),
    pytest.param(b'{"model": "\\ud800"}', id="row-39-surrogate"),
    pytest.param(b'{"model": NaN}', id="row-39-nan"),
]


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize("body", BODIES)
def test_bodies_that_are_not_json(server: LiveServer, route: str, body: bytes) -> None:
    call(server.url, "POST", route, body).error(400, "invalid_json")


@pytest.mark.parametrize("route", JSON_ROUTES)
def test_row_40_a_body_that_is_too_large(server: LiveServer, route: str) -> None:
    body = b'{"model": "' + b"x" * (10 << 20) + b'"}'
    call(server.url, "POST", route, body).error(413, "request_too_large")
    call(server.url, "POST", route, iter([body[:1000], body[1000:]])).error(413, "request_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_the_content_type_does_not_matter(server: LiveServer, kind: str) -> None:
    answer = call(server.url, "POST", "/v1/fine_tuning/jobs", b'{"model": "x"}', {"content-type": kind})
    answer.error(400, "missing_required_parameter", "training_file")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", "/v1/nope", id="row-44-route"),
        pytest.param("GET", "/", id="row-44-root"),
        pytest.param("GET", "/v1/files/a/b/c", id="row-44-deeper"),
        pytest.param("POST", "/v1/fine_tuning/jobs/x/explode", id="row-44-verb"),
        pytest.param("GET", "/v1/%2e%2e/%2e%2e/etc/passwd", id="row-45-traversal"),
        pytest.param("GET", "/%00", id="row-45-nul"),
        pytest.param("GET", "/v1/" + "x" * 10_000, id="row-45-long"),
    ],
)
def test_routes_that_are_not_there(server: LiveServer, method: str, path: str) -> None:
    call(server.url, method, path).error(404, "unknown_url")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        pytest.param("PUT", "/v1/files", {"GET", "POST"}, id="row-44-files"),
        pytest.param("DELETE", "/v1/fine_tuning/jobs", {"GET", "POST"}, id="row-44-jobs"),
        pytest.param("GET", "/v1/chat/completions", {"POST"}, id="row-44-chat"),
        pytest.param("BREW", "/health", {"GET"}, id="row-44-unheard-of"),
    ],
)
def test_row_44_methods_that_are_not_there(server: LiveServer, method: str, path: str, allowed: set[str]) -> None:
    answer = call(server.url, method, path)
    answer.error(405, "method_not_allowed")
    assert set(answer.headers["allow"].replace(" ", "").split(",")) - {"OPTIONS"} == allowed


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a key."""
    live = launch(tmp_path_factory.mktemp("locked"), "auth.keys=[the-key]")
    yield live
    live.stop()


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(None, id="row-35-none"),
        pytest.param("Bearer wrong", id="row-35-wrong"),
        pytest.param("Bearer", id="row-35-empty"),
        pytest.param("Bearer the-key-and-more", id="row-35-longer"),
        pytest.param("Basic the-key", id="row-35-scheme"),
        pytest.param("the-key", id="row-35-bare"),
        pytest.param("Bearer \xff\xfe", id="row-35-bytes"),
    ],
)
def test_row_35_keys_that_do_not_fit(locked: LiveServer, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    for method, path in [("GET", "/v1/files"), ("POST", "/v1/chat/completions"), ("GET", "/v1/arbor/plugins")]:
        call(locked.url, method, path, headers=headers).error(401, "invalid_api_key")


def test_row_35_the_answer_does_not_wait_for_the_body(locked: LiveServer) -> None:
    with raw_socket(locked.url) as connection:
        connection.sendall(b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")
    assert list((locked.storage / "files").rglob("*.tmp")) == []


def test_row_35_the_client_hears_it(locked: LiveServer) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        locked.new_client("wrong").files.create(file=("a", b"x" * 50_000_000), purpose="fine-tune")
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    assert locked.new_client("the-key").files.list().data == []


def test_what_needs_no_key(locked: LiveServer) -> None:
    for path in ("/health", "/ready", "/docs", "/schema/openapi.json"):
        assert call(locked.url, "GET", path).status == 200


def test_every_answer_has_a_request_id_of_its_own(server: LiveServer) -> None:
    paths = ["/health", "/v1/files", "/v1/models", "/docs", "/v1/nope"]
    ids = {call(server.url, "GET", path).headers["x-request-id"] for path in paths}
    assert len(ids) == len(paths)
    assert server.client.models.list()._request_id in {None, *ids} or server.client.files.list()._request_id


def test_the_server_outlives_all_of_this(server: LiveServer) -> None:
    for body in (b"[" * 200_000, b"\xff", b""):
        call(server.url, "POST", "/v1/chat/completions", body)
    assert call(server.url, "GET", "/health").json == {"status": "ok"}
    assert "Traceback" not in server.log


def test_a_fault_of_ours_is_told_to_the_log_and_not_to_the_client(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server()
    with closing(sqlite3.connect(server.storage / "arbor.db")) as db:
        db.execute("ALTER TABLE files RENAME TO elsewhere")
    answer = call(server.url, "GET", "/v1/files")
    error = answer.error(500, "internal_error")
    assert answer.headers["x-should-retry"] == "false"
    assert error["type"] == "server_error"
    assert "table" not in error["message"]
    assert answer.headers["x-request-id"] in error["message"]
    assert answer.headers["x-request-id"] in server.log
    assert "Traceback" in server.log


def test_an_api_error_is_one_line() -> None:
    from arbor_core.server.http.errors import envelope
    from arbor_core.types import ApiError

    error = ApiError(503, "come again", "busy", headers={"retry-after": "1"})
    assert isinstance(error, ArborError)
    assert envelope(error) == b'{"error":{"message":"come again","type":"server_error","param":null,"code":"busy"}}'
