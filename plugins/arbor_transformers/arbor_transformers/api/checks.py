"""What a request's types cannot say, checked before anything reaches the model. Numbers of rows: the faults table."""

from collections.abc import Mapping
from typing import Any

from arbor_core.engine import ApiError

from .requests import ChatRequest, CompletionRequest, Json, Request


def check(request: Request, vocabulary: int) -> None:
    """Everything about a request that needs no tokenizer.

    Raises:
        ApiError: the first field out of its range.
    """
    for name, low, high in INTEGERS:
        _within(name, getattr(request, name, None), low, high, "integer")
    for name, low_end, high_end in DECIMALS:
        _within(name, getattr(request, name, None), low_end, high_end, "decimal")
    for name in ("top_p", "repetition_penalty"):
        if getattr(request, name) == 0:
            message = f"Invalid '{name}': expected a value above 0, but got 0."
            raise ApiError(400, message, "decimal_below_min_value", name)
    if request.limit is not None and request.limit < 1:
        message = f"Invalid '{request.limit_name}': expected at least 1, but got {request.limit}."
        raise ApiError(400, message, "invalid_value", request.limit_name)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "'stream_options' needs 'stream': true.", "invalid_value", "stream_options")
    _check_stops(request, vocabulary)
    _check_bias(request.logit_bias or {}, vocabulary)
    if isinstance(request, ChatRequest):
        _check_chat(request)
    if isinstance(request, CompletionRequest):
        _check_completion(request)


INTEGERS: tuple[tuple[str, int, int], ...] = (
    ("n", 1, 128),
    ("top_k", -1, 1 << 31),
    ("seed", -(1 << 63), (1 << 63) - 1),
    ("min_tokens", 0, 1 << 31),
    ("top_logprobs", 0, 20),
)
DECIMALS: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 10),
)


def _within(name: str, value: float | None, low: float, high: float, kind: str) -> None:
    if value is None or low <= value <= high:
        return
    if value > high:
        message = f"Invalid '{name}': {kind} above maximum value. Expected a value <= {high}, but got {value} instead."
        raise ApiError(400, message, f"{kind}_above_max_value", name)
    message = f"Invalid '{name}': {kind} below minimum value. Expected a value >= {low}, but got {value} instead."
    raise ApiError(400, message, f"{kind}_below_min_value", name)


def _check_stops(request: Request, vocabulary: int) -> None:
    if len(request.stops) > 4:
        message = f"Invalid 'stop': array too long. Expected at most 4 items, but got {len(request.stops)} instead."
        raise ApiError(400, message, "array_above_max_length", "stop")
    if not all(request.stops):
        raise ApiError(400, "Invalid 'stop': an empty string would stop everything at once.", "invalid_value", "stop")
    for token in request.stop_token_ids or []:
        if not 0 <= token < vocabulary:
            message = f"Invalid 'stop_token_ids': {token} is not in 0..{vocabulary - 1}."
            raise ApiError(400, message, "invalid_value", "stop_token_ids")


def _check_bias(bias: Mapping[str, float], vocabulary: int) -> None:
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocabulary):
            message = f"Invalid key in 'logit_bias': '{token}' is not a token id in 0..{vocabulary - 1}."
            raise ApiError(400, message, "invalid_value", "logit_bias")
        if not -100 <= value <= 100:
            message = f"Invalid 'logit_bias.{token}': expected a value in -100..100, but got {value}."
            raise ApiError(400, message, "invalid_value", "logit_bias")


def _check_completion(request: CompletionRequest) -> None:
    _within("logprobs", request.logprobs, 0, 5, "integer")
    for name in ("echo", "suffix"):
        if getattr(request, name):
            raise ApiError(400, f"'{name}' is not supported by this engine.", "unsupported_parameter", name)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise ApiError(400, "'best_of' other than 'n' is not supported.", "unsupported_parameter", "best_of")
    if not request.prompts or len(request.prompts) > 2048:
        message = f"Invalid 'prompt': expected 1 to 2048 prompts, but got {len(request.prompts)}."
        raise ApiError(400, message, "invalid_value", "prompt")


def _check_chat(request: ChatRequest) -> None:
    """What only a conversation can get wrong."""
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", "invalid_value", "top_logprobs")
    kind = (request.response_format or {}).get("type", "text")
    if kind != "text":
        message = f"'response_format' of type {kind!r} is not supported by this engine, only 'text'."
        raise ApiError(400, message, "unsupported_parameter", "response_format")
    if request.store:
        raise ApiError(400, "Stored completions are not supported.", "unsupported_parameter", "store")
    if set(request.modalities or ["text"]) != {"text"}:
        raise ApiError(400, "Only the modality 'text' is supported.", "unsupported_parameter", "modalities")
    _check_tools(request)
    if not request.messages:
        raise ApiError(
            400, "Invalid 'messages': empty array. Expected at least one message.", "empty_array", "messages"
        )
    for i, turn in enumerate(request.messages):
        _check_message(turn, f"messages[{i}]")


def _check_tools(request: ChatRequest) -> None:
    names = set()
    for i, tool in enumerate(request.tools or []):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if tool.get("type") != "function" or not isinstance(name, str):
            message = f"Invalid 'tools[{i}]': expected a tool of type 'function' with a name."
            raise ApiError(400, message, "invalid_value", f"tools[{i}]")
        names.add(name)
    choice = request.tool_choice
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in names:
            raise ApiError(400, f"'tool_choice' names the unknown tool {name!r}.", "invalid_value", "tool_choice")
    if choice not in (None, "none", "auto"):
        message = "This engine cannot force a tool call: 'tool_choice' may be 'auto' or 'none'."
        code = "unsupported_parameter" if choice == "required" or isinstance(choice, dict) else "invalid_value"
        raise ApiError(400, message, code, "tool_choice")


ROLES = {"system", "developer", "user", "assistant", "tool", "function"}


def _check_message(message: Json, path: str) -> None:
    role = message.get("role")
    if role is None:
        raise ApiError(400, f"Missing required parameter: '{path}.role'.", "missing_required_parameter", f"{path}.role")
    if not isinstance(role, str) or role not in ROLES:
        expected = ", ".join(sorted(ROLES))
        raise ApiError(
            400, f"Invalid '{path}.role': {role!r}. Expected one of {expected}.", "invalid_value", f"{path}.role"
        )
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        name = f"{path}.tool_call_id"
        raise ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
    calls = message.get("tool_calls")
    _check_calls(calls, f"{path}.tool_calls")
    content = message.get("content")
    if content is None:
        if role == "assistant" and (calls or message.get("refusal") or message.get("function_call")):
            return
        name = f"{path}.content"
        raise ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
    _check_content(content, f"{path}.content")


def _check_content(content: Any, path: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        message = f"Invalid type for '{path}': expected a text or a list of parts."
        raise ApiError(400, message, "invalid_type", path)
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            message = f"Invalid '{path}[{i}]': this model reads text parts only, but got {kind!r}."
            raise ApiError(400, message, "invalid_value", f"{path}[{i}]")


def _check_calls(calls: Any, path: str) -> None:
    if calls is None:
        return
    if not isinstance(calls, list):
        raise ApiError(400, f"Invalid type for '{path}': expected an array.", "invalid_type", path)
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            message = f"Invalid '{path}[{i}]': expected a call with a function's name and arguments."
            raise ApiError(400, message, "invalid_value", f"{path}[{i}]")
