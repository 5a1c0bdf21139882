"""Sampling parameters that chat and plain completions share, and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Struct

from arbor_core.config.convert import explained
from arbor_core.data.message_rules import hinted
from arbor_core.types import ConfigError

from .json_body import decoded

MAX_TOKENS = (1 << 31) - 1
MAX_STOPS = 4
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(Struct, kw_only=True, forbid_unknown_fields=True):
    """Parameters of both routes. The last group is not OpenAI's; engines share its names."""

    model: str
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Accepted, and without meaning on a server of one's own.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Unit | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    return_token_ids: bool | None = None

    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Parameters that no engine here can honour, and why. Their types admit only values that change nothing."""
    HINTS: ClassVar[Mapping[str, str]] = {}
    """What is expected, by the end of a path, where msgspec does not say."""

    def conversation(self) -> bytes | None:
        """What the requests of one conversation have in common; None: nothing is known of one."""
        return self.prompt_cache_key.encode() if self.prompt_cache_key else None


RequestT = TypeVar("RequestT", bound=Generation)


def refused(name: str, why: str) -> ConfigError:
    """A parameter of OpenAI's that would change the answer and cannot be honoured."""
    return ConfigError(f"Unsupported parameter: '{name}'. {why}", path=name, code="unsupported_parameter")


def read(raw: bytes, decoder: msgspec.json.Decoder[RequestT]) -> RequestT:
    """A request's body, typed.

    Raises:
        ApiError: it is not a JSON object.
        ConfigError: a parameter is unknown, missing, of the wrong type, out of bounds or not supported.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        decoded(raw)  # an array or null is no JSON object: says so
        fault = explained(str(error), decoder.type, "")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded(raw)
        raise
    message = str(fault).replace("[...]", "")
    path = (fault.path or "").replace("[...]", "")
    root = path.partition(".")[0].partition("[")[0]
    if why := decoder.type.REFUSED.get(root):
        raise refused(path, why)
    raise hinted(ConfigError(message, path=path or None, code=fault.code), decoder.type.HINTS)


def check_generation(request: Generation) -> None:
    """Check what types cannot express of the shared parameters.

    Raises:
        ConfigError: with the parameter's name.
    """
    check_limit("max_tokens", request.max_tokens)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS:
        message = f"Invalid 'stop': array too long. Expected at most {MAX_STOPS} items, but got {len(stops)}."
        raise ConfigError(message, path="stop", code="array_above_max_length")
    if not all(stops):
        raise ConfigError("Invalid 'stop': an empty string would stop every answer at once.", path="stop")
    for token in request.logit_bias or ():
        if token < 0:
            raise ConfigError(f"Invalid 'logit_bias': {token} is not the id of a token.", path="logit_bias")
    if request.stream_options is not None and not request.stream:
        raise ConfigError("'stream_options' is only allowed with 'stream': true.", path="stream_options")


def check_limit(name: str, value: int | None) -> None:
    """Tokens to generate at most."""
    if value is not None and not 1 <= value <= MAX_TOKENS:
        raise ConfigError(f"Invalid '{name}': expected a number of tokens from 1 on, but got {value}.", path=name)
