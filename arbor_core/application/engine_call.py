"""One completion on the engine that serves its model: the request there and the response back, byte by byte."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from arbor_core.inference.engines import Engines
from arbor_core.inference.redaction import without_paths
from arbor_core.models.fine_tuned import Resolved
from arbor_core.types import NO_RETRY, RETRY_SOON, ApiError, Engine

from .json_body import decoded

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)
KEPT_HEADERS = ("retry-after", "x-should-retry")
"""Headers of an engine's error that the client gets too."""
Header = tuple[bytes, bytes]


class EngineCall:
    """A completion that is asked for.

    Args:
        path: The route, the same here and at the engine.
        body: The request's body, for the engine.
        stream: Whether the response comes as server-sent events.
        conversation: What the requests of one conversation have in common; they go to one engine.
    """

    def __init__(
        self,
        engines: Engines,
        resolved: Resolved,
        path: str,
        body: bytes,
        stream: bool,
        conversation: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self.engines, self.resolved, self.path, self.body, self.stream = engines, resolved, path, body, stream
        self.conversation = conversation
        self.headers: list[Header] = []
        """What a client over HTTP is told beside the response. A newer policy may answer than the one asked for: they
        are right once there is anything of a response."""

    async def whole(self, request_id: str) -> bytes:
        """The response, which is no stream.

        Raises:
            ApiError: the engine cannot answer.
        """
        async with self._engine() as engine, self._response(engine, request_id) as upstream:
            raw = await upstream.read()
        return self.finished(raw)

    async def events(self, request_id: str) -> AsyncGenerator[bytes, None]:
        """The stream of events, in pieces as they come.

        Raises:
            ApiError: the engine cannot answer, or breaks off.
        """
        async with self._engine() as engine, self._response(engine, request_id) as upstream:
            async for chunk in self.chunks(upstream.content.iter_any()):
                yield chunk

    @asynccontextmanager
    async def _engine(self) -> AsyncIterator[Engine]:
        async with self.engines.serving(self.resolved, self.conversation) as (engine, resolved):
            if resolved != self.resolved:
                self.resolved = resolved
                self.superseded()
            yield engine

    def superseded(self) -> None:
        """`resolved` is a newer policy than the one that the request was made for: the engine has it by this name."""
        self.body = msgspec.json.encode(decoded(self.body) | {"model": self.resolved.name})

    def finished(self, raw: bytes) -> bytes:
        """What the client gets of a whole response: all of it."""
        return raw

    def chunks(self, answer: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """What the client gets of a stream: all of it."""
        return answer

    @asynccontextmanager
    async def _response(self, engine: Engine, request_id: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's answer, once it begins.

        Raises:
            ApiError: the engine refused, or broke the connection, here or while the answer was read.
        """
        import aiohttp  # only now: a server that serves no model is 8 MB smaller

        try:
            async with await self._post(engine, request_id) as upstream:
                if upstream.status >= 400:
                    raise failure(upstream.status, await upstream.read(), upstream.headers)
                yield upstream
        except (aiohttp.ClientError, OSError) as error:
            await self.engines.suspect(engine)
            raise unavailable(self.resolved.name, error) from None

    async def _post(self, engine: Engine, request_id: str) -> aiohttp.ClientResponse:
        """Send the request; once more if only a connection was lost that had been kept open."""
        import aiohttp

        headers = {"content-type": "application/json", "x-request-id": request_id, **engine.headers}
        try:
            return await self.engines.session.post(engine.url + self.path, data=self.body, headers=headers)
        except (aiohttp.ClientError, OSError) as error:
            if await self.engines.suspect(engine):
                raise unavailable(self.resolved.name, error) from None
        return await self.engines.session.post(engine.url + self.path, data=self.body, headers=headers)


def unavailable(model: str, error: Exception) -> ApiError:
    """Row 130: another engine is started by the next request, so trying again helps."""
    log.warning("the engine of %s broke a request off: %s", model, str(error) or type(error).__name__)
    message = f"The engine of '{model}' did not answer. It is started again: repeat the request."
    return ApiError(503, message, "engine_unavailable", headers=RETRY_SOON)


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
