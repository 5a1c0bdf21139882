"""What a request's types cannot say, checked before anything reaches the model. Numbers of rows: the faults table."""

from collections.abc import Mapping

from arbor_core.engine import ApiError, ConfigError, Rules, read_chat_data

from .requests import ChatRequest, CompletionRequest, Request


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
    if not request.messages:
        raise ApiError(
            400, "Invalid 'messages': empty array. Expected at least one message.", "empty_array", "messages"
        )
    try:
        read_chat_data({"messages": request.messages, "tools": request.tools}, Rules(strict=True))
    except ConfigError as error:
        raise ApiError(400, str(error), error.code, error.path) from None
    _check_choice(request)


def _check_choice(request: ChatRequest) -> None:
    choice = request.tool_choice
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in [tool["function"]["name"] for tool in request.tools or ()]:
            raise ApiError(400, f"'tool_choice' names the unknown tool {name!r}.", "invalid_value", "tool_choice")
    if choice not in (None, "none", "auto"):
        message = "This engine cannot force a tool call: 'tool_choice' may be 'auto' or 'none'."
        code = "unsupported_parameter" if choice == "required" or isinstance(choice, dict) else "invalid_value"
        raise ApiError(400, message, code, "tool_choice")
