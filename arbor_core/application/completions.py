"""Completions without HTTP: which engine serves a model, what it is sent, and what is kept of its answer.

A body is decoded to check it, and goes on to the engine as the bytes that came, unless the model's name has a prefix or
a parameter is null: an engine need not know every parameter that may be null.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec

from arbor_core import ids
from arbor_core.config.api_keys import DEFAULT_OWNER
from arbor_core.inference.engines import Engines
from arbor_core.jobs.repository import Jobs
from arbor_core.models.catalog import Models, strip_provider
from arbor_core.models.fine_tuned import Resolved
from arbor_core.rollouts.session import OpenSessions, Session
from arbor_core.types import ApiError

from .chat_request import read_chat
from .completion_request import read_completion
from .engine_call import EngineCall
from .generation import Generation
from .json_body import decoded
from .recording import RecordedCall

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DATA, DONE = b"data: ", b"[DONE]"


class CompletionService:
    """The completions of a server."""

    def __init__(self, models: Models, jobs: Jobs, sessions: OpenSessions, engines: Engines) -> None:
        self.models, self.jobs, self.sessions, self.engines = models, jobs, sessions, engines

    async def call(self, path: str, request: Generation, raw: bytes, owner: str) -> EngineCall:
        """A completion, ready to be asked for.

        Args:
            path: CHAT or COMPLETIONS.
            request: The body, typed.
            raw: The body as it came.

        Raises:
            ApiError: there is no such model.
        """
        resolved = self.models.resolve(strip_provider(request.model), owner)
        if session := await self._session(resolved):
            body = without_nulls(decoded(raw))
            return RecordedCall(self.engines, resolved, path, body, session.ledger, request.conversation)
        if resolved.name != request.model or b"null" in raw:
            raw = msgspec.json.encode(without_nulls(decoded(raw)) | {"model": resolved.name})
        return EngineCall(self.engines, resolved, path, raw, bool(request.stream), request.conversation)

    async def _session(self, resolved: Resolved) -> Session | None:
        """The rollouts of the job whose policy a model is; None: it is not one."""
        job = self.jobs.get(resolved.live) if resolved.live else None
        return await self.sessions.of(job) if job else None

    async def chat(self, request: Mapping[str, Any], owner: str = DEFAULT_OWNER) -> dict[str, Any]:
        """Answer a conversation: the body of `POST /v1/chat/completions`, and its response.

        Raises:
            ApiError, ConfigError: as over HTTP.
        """
        raw = unstreamed(request)
        return await whole(await self.call(CHAT, read_chat(raw), raw, owner))

    async def complete(self, request: Mapping[str, Any], owner: str = DEFAULT_OWNER) -> dict[str, Any]:
        """Continue a prompt: the body of `POST /v1/completions`, and its response.

        Raises:
            ApiError, ConfigError: as over HTTP.
        """
        raw = unstreamed(request)
        return await whole(await self.call(COMPLETIONS, read_completion(raw), raw, owner))

    async def stream_chat(
        self, request: Mapping[str, Any], owner: str = DEFAULT_OWNER
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Answer a conversation piece by piece: the events of a stream, without the last one, which is no object.

        Raises:
            ApiError, ConfigError: as over HTTP, also in the middle.
        """
        raw = msgspec.json.encode({**request, "stream": True})
        call = await self.call(CHAT, read_chat(raw), raw, owner)
        async with aclosing(call.events(ids.new("req_"))) as chunks:
            held = b""
            async for chunk in chunks:
                *events, held = (held + chunk).split(b"\n\n")
                for event in events:
                    if event.startswith(DATA) and event != DATA + DONE:
                        yield msgspec.json.decode(event[len(DATA) :])


async def whole(call: EngineCall) -> dict[str, Any]:
    return decoded(await call.whole(ids.new("req_")))


def unstreamed(request: Mapping[str, Any]) -> bytes:
    """A body whose response is no stream.

    Raises:
        ApiError: it is to be one.
    """
    if request.get("stream"):
        raise ApiError(400, "Invalid 'stream': this answers at once; use stream_chat.", "invalid_value", "stream")
    return msgspec.json.encode(dict(request))


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}
