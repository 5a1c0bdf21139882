"""Requests as they arrive, typed. What types cannot say is in `checks`.

The server types requests too; these structs are separate, because an engine validates for itself what it supports.
"""

import re
from typing import Any, TypeVar

import msgspec

from arbor_core.engine import ApiError

Json = dict[str, Any]
StructT = TypeVar("StructT", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and plain completions have in common. Fields from `user` on are accepted and mean nothing here."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    metadata: Json | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most, where the request says."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities wanted: None for none, 0 for the sampled tokens alone, else how many others."""
        return None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Request, kw_only=True):
    """`POST /v1/chat/completions`. Fields of type None are OpenAI's and not supported."""

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    response_format: Json | None = None
    chat_template_kwargs: Json | None = None
    store: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    web_search_options: None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        try:
            if any(isinstance(item, str | list) for item in self.prompt):
                return msgspec.convert(self.prompt, list[str | list[int]])
            return [msgspec.convert(self.prompt, list[int])]
        except msgspec.ValidationError as error:
            message = f"Invalid 'prompt': {error}. Expected a text, token ids, or a list of either."
            raise ApiError(400, message, "invalid_type", "prompt") from None


class LoadAdapter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str


class UnloadAdapter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str


class UpdateWeights(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/update_weights`."""

    path: str
    version: int


def parse(body: bytes, kind: type[StructT]) -> StructT:
    """A body as a struct of some kind.

    Raises:
        ApiError: it is not JSON, or not of the kind's shape; with the path of the field at fault.
    """
    if not body.strip():
        raise ApiError(400, "You must provide a JSON body.", "invalid_json")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise mismatch(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", "invalid_json") from None


def mismatch(reason: str) -> ApiError:
    """msgspec's reason why a body has the wrong shape, in OpenAI's terms."""
    text, _, path = reason.partition(" - at ")
    inside = re.sub(r"^`?\$\.?|`$", "", path)
    field = re.search("`([^`]*)`", text)
    if text.startswith("Object missing required field") and field:
        name = f"{inside}.{field[1]}" if inside else field[1]
        return ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
    if text.startswith("Object contains unknown field") and field:
        name = f"{inside}.{field[1]}" if inside else field[1]
        return ApiError(400, f"Unknown parameter: '{name}'.", "unknown_parameter", name)
    if text.startswith("Expected `null`"):
        return ApiError(400, f"'{inside}' is not supported by this engine.", "unsupported_parameter", inside)
    if not inside:
        return ApiError(400, f"The body has the wrong shape: {text}.", "invalid_type")
    return ApiError(400, f"Invalid type for '{inside}': {text}.", "invalid_type", inside)
