"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Any, Literal

from litestar import post
from litestar.types import ASGIApp
from msgspec import Struct

from arbor_core.application.completion_request import CompletionRequest, read_completion
from arbor_core.application.completions import COMPLETIONS
from arbor_core.application.system import Arbor
from arbor_core.server.http.auth import INFER
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, raw_body
from arbor_core.server.relay.relay import answer


class Completion(Struct):
    """What an engine answers: OpenAI's `CreateCompletionResponse`."""

    id: str
    choices: list[dict[str, Any]]
    created: int
    model: str
    usage: dict[str, Any]
    object: Literal["text_completion"] = "text_completion"


@post(
    COMPLETIONS,
    operation_id="createCompletion",
    status_code=200,
    opt=described(
        "Continue a prompt; with stream, as server-sent events.",
        body=CompletionRequest,
        response=Completion,
        streams=True,
        scopes=INFER,
    ),
)
async def create_completion(request: AnyRequest, arbor: Arbor, owner: str) -> ASGIApp:
    raw = await raw_body(request, arbor.settings.limits.upload_idle_seconds)
    return answer(request, await arbor.completion_service.call(COMPLETIONS, read_completion(raw), raw, owner))


ROUTES = [create_completion]
