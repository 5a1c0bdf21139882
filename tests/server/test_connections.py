"""Connections that hold a place and ask for nothing, against a real server. The ids `row_N` are rows of the table of
faults."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_calls import MULTIPART, PURPOSE, Answer, form, raw_socket
from live import LiveServer, launch

SECONDS = 1.0
"""How long a head may take here."""
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = launch(tmp_path_factory.mktemp("hasty"), f"limits.head_seconds={SECONDS}")
    yield live
    live.stop()


def received(connection: socket.socket) -> bytes:
    """All that is left to read, until the server closes the connection."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def parsed(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return Answer(int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body)


def answered(connection: socket.socket) -> Answer:
    """One answer on a connection that stays open."""
    raw = b""
    while b"\r\n\r\n" not in raw or len(parsed(raw).body) < int(parsed(raw).headers["content-length"]):
        piece = connection.recv(65536)
        assert piece, "it was closed"
        raw += piece
    return parsed(raw)


def trickle(connection: socket.socket) -> None:
    """Send a byte now and then until the server has something to say, or closes."""
    began = time.monotonic()
    while not select.select([connection], [], [], 0.05)[0]:
        assert time.monotonic() < began + 120, "the connection is still open"
        connection.sendall(b"x")


def test_row_51_a_connection_that_says_nothing_is_closed(hasty: LiveServer) -> None:
    with raw_socket(hasty.url) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["first", "second"])
def test_row_51_half_a_head(hasty: LiveServer, before: bytes) -> None:
    """Nothing more, or a byte now and then; as the first request of a connection, or after another."""
    for more in (False, True):
        with raw_socket(hasty.url) as connection:
            if before:
                connection.sendall(before)
                assert answered(connection).status == 200
            connection.sendall(HEALTH[:-2] + b"y: ")
            if more:
                trickle(connection)
            answer = parsed(received(connection))
        answer.error(408, "request_timeout")
        assert answer.headers["x-should-retry"] == "false"


def test_row_51_the_rest_of_a_request_that_has_its_answer(hasty: LiveServer) -> None:
    with raw_socket(hasty.url) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
        assert answered(connection).status == 404
        trickle(connection)
        assert received(connection) == b""


def test_whoever_has_sent_a_head_may_take_longer(hasty: LiveServer) -> None:
    """A body that comes slowly, an answer that goes slowly, and a connection that is idle between two requests."""
    body = form(PURPOSE, ("file", b"x" * 100_000, "rows.jsonl"))
    with raw_socket(hasty.url) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: {MULTIPART['content-type']}\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:100])
        sent = 100
        while sent < 10_000:
            assert not select.select([connection], [], [], SECONDS / 50)[0], "it was given up"
            connection.sendall(body[sent : sent + 100])
            sent += 100
        connection.sendall(body[sent:])
        assert answered(connection).status == 200
        assert not select.select([connection], [], [], SECONDS * 1.5)[0], "it was not left idle"
        said = "[mock: token_seconds=0.05] " + "word " * 12
        asked: Any = {"model": "mock/tiny", "stream": True, "messages": [{"role": "user", "content": said}]}
        raw = json.dumps(asked).encode()
        began = time.monotonic()
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n".encode()
            + raw
        )
        stream = b""
        while not stream.endswith(b"\r\n0\r\n\r\n"):
            piece = connection.recv(65536)
            assert piece, "it was closed"
            stream += piece
        assert time.monotonic() > began + SECONDS
        assert b"finish_reason" in stream and b"[DONE]" in stream
        connection.sendall(HEALTH)
        assert answered(connection).status == 200
