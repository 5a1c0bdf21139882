"""The body of `POST /v1/completions`, and the checks that need nothing but it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from arbor_core.types import ConfigError

from .generation import Generation, check_generation, read, refused

MAX_PROMPTS = 2048
MAX_TOKEN_ID = (1 << 31) - 1


class CompletionRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    """Body of a completion. A prompt is text or token ids; several make several choices."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    REFUSED: ClassVar[Mapping[str, str]] = {}


DECODER = msgspec.json.Decoder(CompletionRequest)


def check(request: CompletionRequest) -> None:
    """Check what types cannot express.

    Raises:
        ConfigError: with the parameter's name.
    """
    check_generation(request)
    if request.echo:
        raise refused("echo", "Engines on this server do not repeat the prompt.")
    if request.suffix:
        raise refused("suffix", "Models on this server do not fill in the middle.")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise refused("best_of", "Ask for that many choices with 'n' and take the best.")
    if isinstance(request.prompt, list):
        check_prompts(request.prompt)


def check_prompts(prompt: list[str | int | list[int]]) -> None:
    """A list of texts, of token ids, or of lists of token ids. Whether an id is in the vocabulary the engine knows."""
    if not 1 <= len(prompt) <= MAX_PROMPTS and not (prompt and isinstance(prompt[0], int)):
        message = f"Invalid 'prompt': expected 1 to {MAX_PROMPTS} prompts, but got {len(prompt)}."
        raise ConfigError(message, path="prompt")
    if len({type(item) for item in prompt}) > 1:
        message = "Invalid 'prompt': expected a text, token ids, a list of texts, or a list of lists of token ids."
        raise ConfigError(message, path="prompt", code="invalid_type")
    for tokens in prompt if isinstance(prompt[0], list) else [prompt]:
        if tokens and isinstance(tokens, list) and isinstance(tokens[0], int):
            check_tokens(tokens)  # type: ignore[arg-type]
        elif not tokens:
            raise ConfigError("Invalid 'prompt': a list of token ids is empty.", path="prompt")


def check_tokens(tokens: list[int]) -> None:
    low, high = min(tokens), max(tokens)
    if low < 0 or high > MAX_TOKEN_ID:
        message = f"Invalid 'prompt': {low if low < 0 else high} is not the id of a token."
        raise ConfigError(message, path="prompt")


def read_completion(raw: bytes) -> CompletionRequest:
    """A body, typed and checked.

    Raises:
        ApiError: it is not a JSON object.
        ConfigError: with the parameter's name.
    """
    request = read(raw, DECODER)
    check(request)
    return request
