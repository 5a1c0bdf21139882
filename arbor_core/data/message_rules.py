"""What is wrong with messages and tools, and what they are without a fault: one set of rules, whoever sends them.

Errors name the key at fault (`messages[1].tool_calls[0].function`) in the words of OpenAI's API.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from arbor_core.config.convert import explained
from arbor_core.storage.codec import MAX_DEPTH, too_deep
from arbor_core.types import ConfigError

from .message_form import THOUGHTS
from .messages import HINTS, KNOWN, AssistantMessage, CalledFunction, ChatData, Message, ToolCall, ToolMessage


class Rules(msgspec.Struct, frozen=True):
    """What differs between those who send messages.

    Args:
        strict: Calls have ids, tools name the id that they answer, and arguments are text, as in OpenAI's API. Data for
            training often lacks them, and chat templates rarely need them.
        learned: An assistant's message with a weight other than 0 says something.
    """

    strict: bool = False
    learned: bool = False


def read_chat_data(values: Mapping[str, Any], rules: Rules, where: str = "") -> tuple[ChatData, frozenset[str]]:
    """A conversation, checked, and the keys in its messages that are not known, as `messages[].key`.

    Args:
        values: Plain data, as JSON has it. Keys beside those of a conversation are left alone.
        where: The path of `values`, for errors.

    Raises:
        ConfigError: with the path of the key at fault.
    """
    unknown: set[str] = set()
    try:
        found: ChatData = msgspec.convert(values, ChatData)
    except msgspec.ValidationError:
        found = typed({**values, "messages": known(values.get("messages"), unknown)}, ChatData, where)
    inside = f"{where}." if where else ""
    check(found.messages, f"{inside}messages", rules)
    if found.tools and found.functions:
        message = f"'{inside}functions' is the former name of '{inside}tools': give only '{inside}tools'."
        raise ConfigError(message, path=f"{inside}functions", code="conflicting_parameters")
    check_tools(values.get("tools"), f"{inside}tools")
    check_tools([{"function": each} for each in values.get("functions") or ()], f"{inside}functions")
    return found, frozenset(unknown)


def read_message(values: Any, where: str, rules: Rules) -> Message:
    """One message, checked; keys that are not known are left out.

    Raises:
        ConfigError: with the path of the key at fault.
    """
    try:
        found: Message = msgspec.convert(values, Message)
    except msgspec.ValidationError:
        found = typed(known([values], set())[0], Message, where)
    check_message(found, where, rules)
    return found


def check(messages: Sequence[Message], where: str, rules: Rules) -> None:
    """Check what types cannot express.

    Raises:
        ConfigError: with the path of the key at fault.
    """
    for index, message in enumerate(messages):
        if type(message) is AssistantMessage:  # much the quickest way to tell, and there are very many
            if not is_plain(message):
                check_message(message, f"{where}[{index}]", rules)
        elif rules.strict and type(message) is ToolMessage:
            check_message(message, f"{where}[{index}]", rules)


def is_plain(message: AssistantMessage) -> bool:
    """Whether a message is a text and nothing else, like nearly all, so that no rule is left to check."""
    content, calls = message.content, message.tool_calls or message.function_call
    if type(content) is not str or content == "" or message.weight is not None or calls:
        return False
    return message.reasoning is None and message.thinking is None


def check_message(message: Message, where: str, rules: Rules) -> None:
    """Check what types cannot express of one message.

    Raises:
        ConfigError: with the path of the key at fault.
    """
    if isinstance(message, ToolMessage) and rules.strict and message.tool_call_id is None:
        raise missing(f"{where}.tool_call_id")
    if not isinstance(message, AssistantMessage):
        return
    if not has_content(message):
        raise missing(f"{where}.content", " An assistant message without tool calls has content.")
    if message.weight not in (None, 0, 1):
        raise ConfigError(f"Invalid '{where}.weight': expected 0 or 1.", path=f"{where}.weight")
    if rules.learned and message.weight != 0 and not message.says_something:
        text = f"Invalid '{where}.content': it is empty, so there is nothing to learn; with a weight of 0 it may be."
        raise ConfigError(text, path=f"{where}.content")
    check_thoughts(message, where)
    for index, call in enumerate(message.tool_calls or ()):
        check_call(call, f"{where}.tool_calls[{index}]", rules)
    if message.function_call:
        check_function(message.function_call, f"{where}.function_call", rules)


def check_thoughts(message: AssistantMessage, where: str) -> None:
    """Thoughts stand under one name, or say the same under each."""
    thoughts = {key: text for key in THOUGHTS if (text := getattr(message, key))}
    for key in list(thoughts)[1:]:
        first = next(iter(thoughts))
        if thoughts[key] != thoughts[first]:
            text = f"'{where}.{key}' is another name of '{where}.{first}', and they differ: give only one of them."
            raise ConfigError(text, path=f"{where}.{key}", code="conflicting_parameters")


def has_content(message: AssistantMessage) -> bool:
    """Whether a message has any content; the empty text counts."""
    given = message.content is not None or message.refusal is not None
    return given or message.tool_calls is not None or message.function_call is not None


def check_call(call: ToolCall, where: str, rules: Rules) -> None:
    if rules.strict and call.id is None:
        raise missing(f"{where}.id")
    check_function(call.function, f"{where}.function", rules)


def check_function(function: CalledFunction, where: str, rules: Rules) -> None:
    if isinstance(function.arguments, str):
        return
    if rules.strict:
        path = f"{where}.arguments"
        raise ConfigError(f"Invalid '{path}': Expected `str`, got `object`.", path=path, code="invalid_type")
    message = {
        "tool_calls": [{"function": {"arguments": function.arguments}}]
    }  # as deep as it will be, see `canonical`
    check_depth(message, f"{where}.arguments")


def check_tools(tools: Sequence[Any] | None, where: str) -> None:
    """Check what types cannot express of tools, as plain data.

    Raises:
        ConfigError: with the path of the tool at fault.
    """
    if tools and not is_shallow(tools):
        for index, tool in enumerate(tools):
            check_depth(tool, f"{where}[{index}]")


def check_depth(value: Any, where: str) -> None:
    if not is_shallow(value) and too_deep(value):
        raise ConfigError(f"Invalid '{where}': it is nested more than {MAX_DEPTH} deep.", path=where)


def is_shallow(value: Any) -> bool:
    """Whether a value has so few arrays and objects that it cannot be too deep. Quicker than a look at each of them."""
    try:
        raw = msgspec.json.encode(value)
    except (OverflowError, RecursionError):
        return False
    return raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH


def missing(path: str, why: str = "") -> ConfigError:
    text = f"Missing required parameter: '{path}'.{why}"
    return ConfigError(text, path=path, code="missing_required_parameter")


def typed(values: Any, type_: Any, where: str) -> Any:
    """Plain values as a type of this module.

    Raises:
        ConfigError: with the path of the key at fault, in the words of OpenAI's API.
    """
    try:
        return msgspec.convert(values, type_)
    except msgspec.ValidationError as error:
        text = GOT.sub(lambda match: f"got `{WORDS[match[1]]}`", str(error))
        raise hinted(explained(text, type_, where), HINTS) from None


WORDS = {"NoneType": "null", "list": "array", "dict": "object"}
"""JSON's words for Python's, of which msgspec uses some where it tells messages apart by role."""
GOT = re.compile(f"got `({'|'.join(WORDS)})`")


def hinted(fault: ConfigError, hints: Mapping[str, str]) -> ConfigError:
    """The same fault, which also says what is expected there."""
    place = re.sub(r"\d+", "", fault.path or "")
    hint = next((f" {text}" for end, text in hints.items() if place.endswith(end)), "")
    return ConfigError(f"{fault}{hint}", path=fault.path, code=fault.code)


def known(messages: Any, unknown: set[str]) -> Any:
    """Messages without keys that are not known, whose names are added to `unknown`; nulls are left out silently."""
    return [_known(one, unknown) for one in messages] if isinstance(messages, list) else messages


def _known(message: Any, unknown: set[str]) -> Any:
    role = message.get("role") if isinstance(message, Mapping) else None
    keys = KNOWN.get(role) if isinstance(role, str) else None
    if keys is None or message.keys() <= keys:
        return message
    unknown.update(f"messages[].{key}" for key, value in message.items() if key not in keys and value is not None)
    return {key: value for key, value in message.items() if key in keys}


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation that was read without a fault, as trainers take it: messages and tools without nulls, empty lists
    and keys that are not known; functions are tools, and a function call is a tool call."""
    tools = values.get("tools") or [{"type": "function", "function": each} for each in values.get("functions") or ()]
    return {"messages": [canonical_message(each) for each in values["messages"]], "tools": tools or None}


def canonical_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of a canonical conversation. Its content is there, if only as None."""
    keys = KNOWN[message["role"]] - UNUSED
    found = {key: value for key, value in message.items() if key in keys and value is not None and value != []}
    calls = [canonical_call(call) for call in found.get("tool_calls", ())]
    if function := message.get("function_call"):
        calls.append(canonical_call({"function": function}))
    if calls:
        found["tool_calls"] = calls
    return {"content": None} | found if "content" not in found else found


UNUSED = {"function_call", "annotations", "audio"}
"""Keys that mean nothing to a model, or are said otherwise."""


def canonical_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: call["function"][key] for key in ("name", "arguments")}
    named = {"id": call["id"]} if call.get("id") is not None else {}
    return named | {"type": "function", "function": function}
