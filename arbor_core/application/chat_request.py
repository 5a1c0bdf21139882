"""The body of `POST /v1/chat/completions`, and the checks that need nothing but it."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from arbor_core.data.message_rules import Rules, check_tools, known
from arbor_core.data.message_rules import check as check_messages
from arbor_core.data.messages import HINTS, Message, Tools, UserMessage
from arbor_core.types import ConfigError

from .generation import Generation, check_generation, check_limit, read, refused
from .json_body import decoded


class TextFormat(Struct, tag_field="type", tag="text"):
    pass


class ChatRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    """Body of a chat completion."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    verbosity: str | None = None
    store: bool | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: TextFormat | None = None
    reasoning_effort: Literal["none"] | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    web_search_options: None = None

    REFUSED: ClassVar[Mapping[str, str]] = {
        "audio": "Models on this server read and write text.",
        "function_call": "It is deprecated: use 'tool_choice'.",
        "functions": "It is deprecated: use 'tools'.",
        "modalities": "Models on this server read and write text: expected ['text'].",
        "moderation": "This server does not moderate.",
        "prediction": "Engines on this server do not take predictions.",
        "reasoning_effort": "Models on this server have no reasoning budget to set.",
        "response_format": "Answers cannot be constrained yet: expected {'type': 'text'}.",
        "tool_choice": "A call cannot be enforced: expected 'none' or 'auto'.",
        "web_search_options": "This server does not search.",
    }
    HINTS: ClassVar[Mapping[str, str]] = HINTS

    def conversation(self) -> bytes | None:
        """What all turns of it have in common: later ones extend the messages up to the first of the user."""
        users = (index for index, message in enumerate(self.messages) if isinstance(message, UserMessage))
        beginning = self.messages[: next(users, 0) + 1]
        return super().conversation() or blake2b(msgspec.json.encode(beginning), digest_size=16).digest()


DECODER = msgspec.json.Decoder(ChatRequest)


def check(request: ChatRequest) -> None:
    """Check what types cannot express.

    Raises:
        ConfigError: with the path of the field at fault.
    """
    check_generation(request)
    check_limit("max_completion_tokens", request.max_completion_tokens)
    if request.top_logprobs is not None and not request.logprobs:
        raise ConfigError("'top_logprobs' is only allowed with 'logprobs': true.", path="top_logprobs")
    if request.store:
        raise refused("store", "This server keeps no completions.")
    check_messages(request.messages, "messages", Rules(strict=True))
    check_tools([{"function": {"parameters": tool.function.parameters}} for tool in request.tools or ()], "tools")


def read_chat(raw: bytes) -> ChatRequest:
    """A body, typed and checked.

    Raises:
        ApiError: it is not a JSON object.
        ConfigError: with the path of the field at fault.
    """
    try:
        request = read(raw, DECODER)
    except ConfigError as error:
        if error.code != "unknown_parameter" or not (error.path or "").startswith("messages"):
            raise
        body, unknown = decoded(raw), set[str]()
        body["messages"] = known(body["messages"], unknown)
        if unknown:
            raise
        request = read(msgspec.json.encode(body), DECODER)  # those that it does not know are null, and as good as none
    check(request)
    return request
