"""The relay between client and engine, piece by piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from waiting import until_async

from arbor_core.application.engine_call import EngineCall, failure
from arbor_core.models.fine_tuned import Resolved
from arbor_core.server.http import sse
from arbor_core.server.http.sse import Events
from arbor_core.server.relay.relay import Relay
from arbor_core.types import ApiError


class Client:
    """The client's end of an ASGI connection."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.gone = asyncio.Event()

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


@pytest.mark.parametrize("size", [1, 2, 7, 50, 1000])
async def test_events_are_passed_on_as_they_are_and_never_in_part(size: int) -> None:
    stream = b"".join(b'data: {"number": %d}\n\n' % number for number in range(9)) + b"data: [DONE]\n\n"
    client = Client()
    events = Events(client.send)
    for start in range(0, len(stream), size):
        await events.write(stream[start : start + size])
        assert not client.body or client.body.endswith(b"\n\n")
    await events.close()
    assert client.body == stream
    assert [message["type"] for message in client.messages].count("http.response.start") == 1


async def test_what_was_cut_off_is_not_passed_on() -> None:
    client = Client()
    events = Events(client.send)
    await events.write(b'data: {"whole": 1}\n\ndata: {"cut')
    await events.close()
    assert client.body == b'data: {"whole": 1}\n\n'


class SlowEngines:
    """Engines that take their time, and then cannot.

    Args:
        wait: How long that is.
    """

    def __init__(self, wait: Callable[[], Awaitable[object]]) -> None:
        self.wait = wait
        self.cancelled = False

    @asynccontextmanager
    async def serving(self, _: Resolved, conversation: Any) -> AsyncIterator[Any]:
        try:
            await self.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        raise ApiError(503, "it does not load", "engine_unavailable")
        yield


def relay(engines: Any, stream: bool = True) -> Relay:
    return Relay(EngineCall(engines, Resolved("m", "m", "m"), "/v1/completions", b"{}", stream))


def scope() -> Any:
    return {"type": "http", "state": {}}


async def test_a_stream_that_waits_gets_comments_and_its_error_in_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.02)
    client = Client()
    engines = SlowEngines(lambda: until_async(lambda: client.body.count(b": ping") >= 3))
    await relay(engines)(scope(), client.receive, client.send)
    assert client.messages[0]["status"] == 200
    *comments, error, done, end = client.body.split(b"\n\n")
    assert len(comments) >= 3
    assert set(comments) == {b": ping"}
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    assert (done, end) == (b"data: [DONE]", b"")


class BrokenEngines:
    """Engines whose answer fails in a way that nobody thought of, after a part of an event."""

    class Content:
        async def iter_any(self) -> AsyncIterator[bytes]:
            yield b'data: {"whole": 1}\n\ndata: {"cut'
            raise ZeroDivisionError

    content = Content()

    @asynccontextmanager
    async def serving(self, resolved: Resolved, _: Any) -> AsyncIterator[Any]:
        yield None, resolved


async def test_whatever_breaks_an_open_stream_is_said_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def response(self: EngineCall, engine: Any, id: str) -> AsyncIterator[Any]:
        yield self.engines

    monkeypatch.setattr(EngineCall, "_response", response)
    client = Client()
    await relay(BrokenEngines())(scope(), client.receive, client.send)
    whole, error, done, end = client.body.split(b"\n\n")
    assert whole == b'data: {"whole": 1}'
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert (done, end) == (b"data: [DONE]", b"")


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_byte_has_its_status(stream: bool) -> None:
    client = Client()
    with pytest.raises(ApiError) as caught:
        await relay(SlowEngines(partial(asyncio.sleep, 0)), stream)(scope(), client.receive, client.send)
    assert caught.value.status == 503
    assert client.messages == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_is_not_worked_for(stream: bool) -> None:
    client, engines = Client(), SlowEngines(asyncio.Event().wait)
    answering = asyncio.create_task(relay(engines, stream)(scope(), client.receive, client.send))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    client.gone.set()
    async with asyncio.timeout(120):
        await answering
    assert engines.cancelled
    assert client.messages == []


@pytest.mark.parametrize(
    ("status", "raw", "wanted"),
    [
        (400, b'{"error": {"message": "m", "code": 400, "param": "n"}}', (400, "m", "400", "n")),
        (404, b'{"error": {"message": "m", "code": "c", "type": "t"}}', (404, "m", "c", None)),
        (500, b'{"error": {"message": "m"}}', (500, "m", "engine_error", None)),
        (500, b'{"error": {"message": "no /srv/store/x"}}', (500, "no x", "engine_error", None)),
        (502, b"<html>", (502, "The engine answered 502 without a reason.", "engine_error", None)),
        (400, b'{"error": "text"}', (400, "The engine answered 400 without a reason.", "engine_error", None)),
        (422, b"\xff", (422, "The engine answered 422 without a reason.", "engine_error", None)),
        (401, b"{}", (500, "The engine did not accept this server's token.", "engine_error", None)),
    ],
)
def test_refusals_of_engines_get_our_envelope(status: int, raw: bytes, wanted: tuple[Any, ...]) -> None:
    error = failure(status, raw, {"retry-after": "3", "server": "x"})
    assert (error.status, str(error), error.code, error.param) == wanted
    assert error.headers in ({"retry-after": "3"}, {"x-should-retry": "false"})
