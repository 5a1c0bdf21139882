"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any, Literal

from litestar import post
from litestar.types import ASGIApp
from msgspec import Struct

from arbor_core.application.chat_request import ChatRequest, read_chat
from arbor_core.application.completions import CHAT
from arbor_core.application.system import Arbor
from arbor_core.server.http.auth import INFER
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, raw_body
from arbor_core.server.relay.relay import answer


class ChatCompletion(Struct):
    """What an engine answers: OpenAI's `CreateChatCompletionResponse`."""

    id: str
    choices: list[dict[str, Any]]
    created: int
    model: str
    usage: dict[str, Any]
    object: Literal["chat.completion"] = "chat.completion"


@post(
    CHAT,
    operation_id="createChatCompletion",
    status_code=200,
    opt=described(
        "Answer a conversation; with stream, as server-sent events.",
        body=ChatRequest,
        response=ChatCompletion,
        streams=True,
        scopes=INFER,
    ),
)
async def create_chat_completion(request: AnyRequest, arbor: Arbor, owner: str) -> ASGIApp:
    raw = await raw_body(request, arbor.settings.limits.upload_idle_seconds)
    return answer(request, await arbor.completion_service.call(CHAT, read_chat(raw), raw, owner))


ROUTES = [create_chat_completion]
