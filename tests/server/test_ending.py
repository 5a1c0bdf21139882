"""What is under way when the server ends. The ids `row_N` are rows of the table of faults."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from completions import CHAT, MODEL, PLAIN, asked, engine_health, frames, post
from http_calls import MULTIPART, PURPOSE, form, raw_socket
from live import LiveServer
from waiting import until

from arbor_core.server.http.serving import Ending


def begin(server: LiveServer, path: str, kind: str, raw: bytes, length: int | None = None) -> socket.socket:
    """Send a request, or the part of it that is in `raw`; its answer is read by whoever wants it."""
    connection = raw_socket(server.url)
    head = f"POST {path} HTTP/1.0\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {length or len(raw)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + raw)
    return connection


LONG = "[mock: token_seconds=0.05] " + "word " * 50


def json_of(body: Any) -> tuple[str, bytes]:
    """What `begin` takes of a JSON body."""
    return "application/json", json.dumps(body).encode()


def read(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body."""
    with connection, connection.makefile("rb") as answer:
        head, _, body = answer.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_row_114_what_outlives_the_server_is_told_so(start_server: Callable[..., LiveServer]) -> None:
    server = start_server("limits.shutdown_seconds=0.3")
    post(server, CHAT, asked("start the engine"))
    upload = form(PURPOSE, ("file", b"{}\n", "rows.jsonl"))[:-12]
    streams = [
        begin(server, CHAT, *json_of(asked(LONG, stream=True))),
        begin(server, PLAIN, *json_of({"model": MODEL, "prompt": LONG, "stream": True, "max_tokens": 400})),
    ]
    others = [
        begin(server, CHAT, *json_of(asked(LONG))),
        begin(server, "/v1/files", MULTIPART["content-type"], upload, 1_000_000),
        begin(server, "/v1/fine_tuning/jobs", "application/json", b"{", 100),
    ]
    until(lambda: engine_health(server)["running"] == 3)
    for stream in streams:
        while b"data: " not in stream.recv(1 << 16, socket.MSG_PEEK):
            pass
    until(lambda: any((server.storage / "files" / ".incoming").iterdir()))
    assert server.stop() == 0
    for stream in streams:
        status, body = read(stream)
        *events, last = frames(body)
        assert status == 200
        assert len(events) > 1
        assert last["error"]["code"] == "server_shutting_down"
        assert set(last["error"]) == {"message", "type", "param", "code"}
    for other in others:
        status, body = read(other)
        assert (status, json.loads(body)["error"]["code"]) == (503, "server_shutting_down")
    assert "Traceback" not in server.log
    assert not any((server.storage / "files" / ".incoming").iterdir())


def test_row_114_what_ends_in_time_is_whole(start_server: Callable[..., LiveServer]) -> None:
    server = start_server()
    post(server, CHAT, asked("start the engine"))
    stream = begin(server, CHAT, *json_of(asked(LONG, stream=True, max_tokens=40)))
    while b"data: " not in stream.recv(1 << 16, socket.MSG_PEEK):
        pass
    server.process.send_signal(signal.SIGTERM)
    status, body = read(stream)
    events = frames(body)
    assert status == 200
    assert events[-1]["choices"][0]["finish_reason"]
    assert server.stop() == 0
    assert server.log == ""


async def test_a_client_that_does_not_read_hears_nothing_and_holds_nobody_up() -> None:
    async def stuck(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start"})
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.Event().wait()  # last words that nobody takes

    async def taken(_: Any) -> None:
        pass

    ending = Ending(stuck)
    request = asyncio.create_task(ending({"type": "http"}, taken, taken))  # type: ignore[typeddict-item,arg-type]
    await asyncio.sleep(0)
    ending.end()
    await asyncio.sleep(0)
    assert not request.done()
    request.cancel()  # as uvicorn does in the end
    await request
    assert ending.under_way == set()


async def test_whoever_cancels_a_request_before_hears_it() -> None:
    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    request = asyncio.create_task(Ending(waiting)({"type": "http"}, None, None))  # type: ignore[typeddict-item,arg-type]
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
