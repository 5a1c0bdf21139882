"""Messages and tools of OpenAI's chat API, typed: for training rows, chat requests and groups of rollouts alike.

A key that is null is as good as none, for every role, because tables write each key that some message has into all of
them; so is an empty list. What types cannot say is in `message_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

NoList = Annotated[list[Any], Meta(max_length=0)]


class TextPart(Struct, tag_field="type", tag="text"):
    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal"):
    refusal: str


Content = str | Annotated[list[TextPart], Meta(min_length=1)]


class CalledFunction(Struct):
    """`arguments` are JSON as text, or, see `message_rules.Rules`, the object itself."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Struct):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = "function"


class AnyMessage(Struct, kw_only=True, tag_field="role", forbid_unknown_fields=True, omit_defaults=True):
    """`reasoning_content` and its namesakes are what chat templates call a model's thoughts."""

    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    tool_plan: str | None = None
    audio: None = None


class OthersMessage(AnyMessage, kw_only=True):
    """Keys of an assistant's messages, which those of others do not use."""

    weight: None = None
    refusal: None = None
    tool_calls: NoList | None = None
    function_call: None = None
    annotations: NoList | None = None


class Instruction(OthersMessage, kw_only=True, tag="system"):
    content: Content
    name: str | None = None
    tool_call_id: None = None


class DeveloperInstruction(Instruction, kw_only=True, tag="developer"):
    pass


class UserMessage(Instruction, kw_only=True, tag="user"):
    pass


class AssistantMessage(AnyMessage, kw_only=True, tag="assistant"):
    """`weight`: 0 or 1, whether a trainer learns it."""

    content: str | list[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None
    weight: Annotated[float, Meta(ge=0, le=1)] | None = None
    name: str | None = None
    annotations: list[Any] | None = None
    tool_call_id: None = None

    @property
    def says_something(self) -> bool:
        """Whether it has any text, or calls a tool."""
        if isinstance(self.content, list):
            text = any(part.text if isinstance(part, TextPart) else part.refusal for part in self.content)
        else:
            text = bool(self.content)
        return bool(text or self.refusal or self.tool_calls or self.function_call)


class ToolMessage(OthersMessage, kw_only=True, tag="tool"):
    content: Content
    name: str | None = None
    tool_call_id: str | None = None


class FunctionMessage(OthersMessage, kw_only=True, tag="function"):
    content: str | None
    name: str
    tool_call_id: None = None


Message = Instruction | DeveloperInstruction | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


class Function(Struct):
    """Tools keep what else they carry: chat templates may use it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    function: Function
    type: Literal["function"] = "function"


Tools = Annotated[list[Tool], Meta(max_length=128)]
HINTS: Mapping[str, str] = {
    ".role": "Expected system, developer, user, assistant, tool or function.",
    ".content[].type": "Models on this server read and write text: expected text.",
    "tools[].type": "Expected function.",
    ".tool_calls": "A list of calls, which only an assistant's message has.",
    ".function_call": "An object with name and arguments, which only an assistant's message has.",
    ".weight": "It is 0 or 1, and only an assistant's message has one.",
    ".refusal": "A text, which only an assistant's message has.",
    ".tool_call_id": "A text, which only a tool's message has.",
}
"""What is expected, by the end of a path without its numbers, where msgspec does not say."""


class ChatData(Struct):
    """What is read of a training row, or of an item of a group."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: Tools | None = None
    functions: Annotated[list[Function], Meta(max_length=128)] | None = None
    parallel_tool_calls: bool | None = None


KNOWN: Mapping[str, frozenset[str]] = {
    str(type_.__struct_config__.tag): frozenset(type_.__struct_fields__) | {"role"} for type_ in get_args(Message)
}
"""The keys of each role's messages."""
