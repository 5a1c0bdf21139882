"""Answers a completion over HTTP with what its engine answers; every failure has OpenAI's envelope."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import cast

from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from arbor_core.application.engine_call import EngineCall
from arbor_core.server.http.auth import caller_of
from arbor_core.server.http.errors import request_id, shutting_down
from arbor_core.server.http.requests import AnyRequest
from arbor_core.server.http.sse import Events
from arbor_core.types import ApiError

log = logging.getLogger(__name__)


class Relay:
    """An ASGI application that answers one request.

    Args:
        call: What it asks for.
    """

    def __init__(self, call: EngineCall) -> None:
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client goes away first: then the request to the engine ends too.

        Raises:
            ApiError: nothing has been sent yet, and the engine cannot answer.
        """
        id = request_id(cast("HTTPScope", scope))  # noqa: A001
        answer = asyncio.create_task(self._streamed(id, send) if self.call.stream else self._whole(id, send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _whole(self, id: str, send: Send) -> None:
        raw = await self.call.whole(id)
        length = (b"content-length", str(len(raw)).encode())
        headers = [(b"content-type", b"application/json"), length, *self.call.headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": raw, "more_body": False})

    async def _streamed(self, id: str, send: Send) -> None:
        events = Events(send, self.call.headers)
        pings = asyncio.create_task(events.keep_alive())
        try:
            async with aclosing(self.call.events(id)) as chunks:
                async for chunk in chunks:
                    await events.write(chunk)
        except Exception as error:  # once the stream is open, its client gets any error in it
            pings.cancel()
            if not events.opened:
                raise
            await events.fail(in_band(error, events.begun))
        except asyncio.CancelledError:
            pings.cancel()
            if events.opened:  # the server ends; if it was the client that went, nobody reads it
                await events.fail(shutting_down())
                await events.close()
            raise
        finally:
            pings.cancel()
        await events.close()


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def in_band(error: Exception, begun: bool) -> ApiError:
    """An error as a stream tells it; `begun`: the engine had answered already, so it is the engine that was lost."""
    if not isinstance(error, ApiError):
        log.error("a stream failed", exc_info=error)
        return ApiError(500, "The server had an error while it worked on your request.", "internal_error")
    return ApiError(error.status, f"The engine died: {error}", "engine_dead") if begun else error


def answer(request: AnyRequest, call: EngineCall) -> ASGIApp:
    """The response to a request: a completion, which counts for its caller while it is answered."""
    caller, relay = caller_of(request), Relay(call)

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        with caller.completion():
            await relay(scope, receive, send)

    return counted
