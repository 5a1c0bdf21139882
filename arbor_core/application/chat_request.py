"""The body of `POST /v1/chat/completions`, and the checks that need nothing but it."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from arbor_core.types import ConfigError

from .generation import Generation, check_generation, check_limit, read, refused


class TextPart(Struct, tag_field="type", tag="text"):
    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal"):
    refusal: str


Content = str | Annotated[list[TextPart], Meta(min_length=1)]


class Instruction(Struct, kw_only=True, tag_field="role", tag="system"):
    """Messages keep what else they carry (`name`, `reasoning_content`): chat templates may use it."""

    content: Content


class DeveloperInstruction(Instruction, tag="developer"):
    pass


class UserMessage(Struct, kw_only=True, tag_field="role", tag="user"):
    content: Content


class CalledFunction(Struct):
    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantMessage(Struct, kw_only=True, tag_field="role", tag="assistant"):
    content: str | list[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None


class ToolMessage(Struct, kw_only=True, tag_field="role", tag="tool"):
    content: Content
    tool_call_id: str


class FunctionMessage(Struct, kw_only=True, tag_field="role", tag="function"):
    content: str | None
    name: str


Message = Instruction | DeveloperInstruction | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


class Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    function: Function
    type: Literal["function"] = "function"


class TextFormat(Struct, tag_field="type", tag="text"):
    pass


class ChatRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    """Body of a chat completion."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
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
    HINTS: ClassVar[Mapping[str, str]] = {
        "].role": "Expected system, developer, user, assistant, tool or function.",
        ".content[].type": "Models on this server read and write text: expected text.",
        "tools[].type": "Expected function.",
    }

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
    for index, message in enumerate(request.messages):
        if isinstance(message, AssistantMessage) and not has_content(message):
            path = f"messages[{index}].content"
            text = f"Missing required parameter: '{path}'. An assistant message without tool calls has content."
            raise ConfigError(text, path=path, code="missing_required_parameter")


def has_content(message: AssistantMessage) -> bool:
    """Whether a message has any content; the empty text counts."""
    return any(
        part is not None for part in (message.content, message.refusal, message.tool_calls, message.function_call)
    )


def read_chat(raw: bytes) -> ChatRequest:
    """A body, typed and checked.

    Raises:
        ApiError: it is not a JSON object.
        ConfigError: with the path of the field at fault.
    """
    request = read(raw, DECODER)
    check(request)
    return request
