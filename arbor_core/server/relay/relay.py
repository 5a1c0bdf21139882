"""Relays a request to its engine and the response back, byte by byte; every failure has OpenAI's envelope."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import msgspec
from litestar.types import HTTPScope, Receive, Scope, Send

from arbor_core.inference.engines import Engines
from arbor_core.inference.redaction import without_paths
from arbor_core.models.fine_tuned import Resolved
from arbor_core.server.http.errors import request_id, shutting_down
from arbor_core.server.http.sse import Events, Header
from arbor_core.types import NO_RETRY, RETRY_SOON, ApiError, Engine

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

KEPT_HEADERS = ("retry-after", "x-should-retry")
"""Headers of an engine's error that the client gets too."""


class Relay:
    """An ASGI application that answers one request with what its engine answers.

    Args:
        path: The route, the same here and there.
        body: The request's body, for the engine.
        stream: Whether the answer comes as server-sent events.
    """

    def __init__(self, engines: Engines, resolved: Resolved, path: str, body: bytes, stream: bool) -> None:
        self.engines, self.resolved, self.path, self.body, self.stream = engines, resolved, path, body, stream
        self.headers: list[Header] = []
        """Of the answer, beside those that say what it is."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client goes away first: then the request to the engine ends too.

        Raises:
            ApiError: nothing has been sent yet, and the engine cannot answer.
        """
        id = request_id(cast("HTTPScope", scope))  # noqa: A001
        answer = asyncio.create_task(self._streamed(id, send) if self.stream else self._whole(id, send))
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
        raw = b""
        async with self._engine() as engine, self._response(engine, id) as upstream:
            raw = await upstream.read()
        raw = self.finished(raw)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode()), *self.headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": raw, "more_body": False})

    async def _streamed(self, id: str, send: Send) -> None:
        events = Events(send, self.headers)
        pings = asyncio.create_task(events.keep_alive())
        try:
            async with self._engine() as engine, self._response(engine, id) as upstream:
                async for chunk in self.chunks(upstream.content.iter_any()):
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

    @asynccontextmanager
    async def _engine(self) -> AsyncIterator[Engine]:
        async with self.engines.serving(self.resolved) as (engine, resolved):
            if resolved != self.resolved:
                self.resolved = resolved
                self.superseded()
            yield engine

    def superseded(self) -> None:
        """`resolved` is a newer policy than the one that the request was made for."""

    def finished(self, raw: bytes) -> bytes:
        """What the client gets of a whole response: all of it."""
        return raw

    def chunks(self, answer: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """What the client gets of a stream: all of it."""
        return answer

    @asynccontextmanager
    async def _response(self, engine: Engine, id: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's answer, once it begins.

        Raises:
            ApiError: the engine refused, or broke the connection, here or while the answer was read.
        """
        import aiohttp  # only now: a server that serves no model is 8 MB smaller

        try:
            async with await self._post(engine, id) as upstream:
                if upstream.status >= 400:
                    raise failure(upstream.status, await upstream.read(), upstream.headers)
                yield upstream
        except (aiohttp.ClientError, OSError) as error:
            await self.engines.suspect(engine)
            raise unavailable(self.resolved.name, error) from None

    async def _post(self, engine: Engine, id: str) -> aiohttp.ClientResponse:
        """Send the request; once more if only a connection was lost that had been kept open."""
        import aiohttp

        headers = {"content-type": "application/json", "x-request-id": id, **engine.headers}
        try:
            return await self.engines.session.post(engine.url + self.path, data=self.body, headers=headers)
        except (aiohttp.ClientError, OSError) as error:
            if await self.engines.suspect(engine):
                raise unavailable(self.resolved.name, error) from None
        return await self.engines.session.post(engine.url + self.path, data=self.body, headers=headers)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def unavailable(model: str, error: Exception) -> ApiError:
    """Row 130: another engine is started by the next request, so trying again helps."""
    log.warning("the engine of %s broke a request off: %s", model, str(error) or type(error).__name__)
    message = f"The engine of '{model}' did not answer. It is started again: repeat the request."
    return ApiError(503, message, "engine_unavailable", headers=RETRY_SOON)


def in_band(error: Exception, begun: bool) -> ApiError:
    """An error as a stream tells it; `begun`: the engine had answered already, so it is the engine that was lost."""
    if not isinstance(error, ApiError):
        log.error("a stream failed", exc_info=error)
        return ApiError(500, "The server had an error while it worked on your request.", "internal_error")
    return ApiError(error.status, f"The engine died: {error}", "engine_dead") if begun else error


class EngineErrorBody(msgspec.Struct):
    message: str
    code: str | int | None = None
    param: str | None = None


class EngineError(msgspec.Struct):
    """OpenAI's envelope, as engines write it: some leave keys out, some have numbers for codes."""

    error: EngineErrorBody


def failure(status: int, raw: bytes, headers: Any) -> ApiError:
    """An engine's refusal as ours. A page, or anything that is no envelope, is not passed on, and no path either."""
    kept = {name: headers[name] for name in KEPT_HEADERS if name in headers}
    if status in (401, 403):
        return ApiError(500, "The engine did not accept this server's token.", "engine_error", headers=NO_RETRY)
    try:
        said = msgspec.json.decode(raw, type=EngineError).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ApiError(status, f"The engine answered {status} without a reason.", "engine_error", headers=kept)
    if (message := without_paths(said.message)) != said.message:
        log.warning("an engine answered %d: %s", status, said.message)
    code = "engine_error" if said.code is None else str(said.code)
    return ApiError(status, message, code, said.param, kept)
