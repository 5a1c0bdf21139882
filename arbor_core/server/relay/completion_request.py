"""From a completion request to the relay that answers it.

The body is decoded to check it, and goes on to the engine as the bytes that came, unless the model's name has a prefix
or a parameter is null: an engine need not know every parameter that may be null.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar.types import ASGIApp, Receive, Scope, Send

from arbor_core.application.system import Arbor
from arbor_core.models.catalog import strip_provider
from arbor_core.models.fine_tuned import Resolved
from arbor_core.rollouts.session import Session
from arbor_core.server.http.auth import caller_of
from arbor_core.server.http.requests import AnyRequest, decoded

from .parameters import Generation
from .recording import RecordingRelay
from .relay import Relay


def relay_for(request: AnyRequest, arbor: Arbor, owner: str, generation: Generation, raw: bytes) -> ASGIApp:
    """The answer of the engine that serves the model, as it comes.

    Args:
        generation: The body, typed.
        raw: The body as it came.

    Raises:
        ApiError: there is no such model.
    """
    resolved = arbor.models.resolve(strip_provider(generation.model), owner)
    path = request.scope["path"]
    if session := session_of(arbor, resolved):
        relay: Relay = RecordingRelay(arbor.engines, resolved, path, without_nulls(decoded(raw)), session.ledger)
    else:
        if resolved.name != generation.model or b"null" in raw:
            raw = msgspec.json.encode(without_nulls(decoded(raw)) | {"model": resolved.name})
        relay = Relay(arbor.engines, resolved, path, raw, bool(generation.stream))
    caller = caller_of(request)

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        with caller.completion():
            await relay(scope, receive, send)

    return counted


def session_of(arbor: Arbor, resolved: Resolved) -> Session | None:
    """The rollouts of the job whose policy a model is; None: it is not one."""
    job = arbor.jobs.get(resolved.live) if resolved.live else None
    return arbor.sessions.of(job) if job else None


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}
