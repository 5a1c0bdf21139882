"""Reading requests: JSON bodies and query strings, each mistake with OpenAI's code and the path of the field."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from litestar import Request

from arbor_core.application.json_body import decoded
from arbor_core.config.convert import typed
from arbor_core.types import CLOSE, NO_RETRY, ApiError, ConfigError

T = TypeVar("T")
AnyRequest = Request[Any, Any, Any]


async def raw_body(request: AnyRequest, seconds: float, setting: str = "limits.upload_idle_seconds") -> bytes:
    """A whole body. Litestar has bounded its size (`limits.json_bytes`).

    Args:
        setting: Name of the setting that `seconds` comes from; empty: none.

    Raises:
        ApiError: 408: it did not come within `seconds`.
    """
    try:
        async with asyncio.timeout(seconds):
            return await request.body()
    except TimeoutError:
        source = f" ({setting})" if setting else ""
        message = f"The body did not come within {seconds:g} seconds{source}."
        raise ApiError(408, message, "request_timeout", headers=NO_RETRY | CLOSE) from None


async def body(request: AnyRequest, type_: type[T], seconds: float) -> T:
    """A JSON body as a struct.

    Raises:
        ApiError: `invalid_json`: it is not a JSON object. 408: it did not come within `seconds`.
        ConfigError: a field is unknown, missing or of the wrong type; becomes a 400 with the field's path.
    """
    return typed(decoded(await raw_body(request, seconds)), type_, "")


def query(request: AnyRequest, type_: type[T]) -> T:
    """The query string as a struct; what the struct does not know is ignored.

    Raises:
        ConfigError: a value is out of bounds or not a number; becomes a 400 with the parameter's name.
    """
    values = {name: value for name, value in request.query_params.items() if value != ""}
    try:
        return msgspec.convert(values, type_, strict=False)
    except msgspec.ValidationError:
        pass
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(type_)}  # type: ignore[arg-type]
    for name in fields.keys() & values.keys():
        if reason := _fault(values[name], fields[name]):
            code = "integer_above_max_value" if "<=" in reason else "invalid_value"
            message = f"Invalid '{name}': {reason}, got '{values[name][:80]}'."
            raise ConfigError(message, path=name, code=code)
    raise AssertionError(f"msgspec refused {values} as {type_}, but none of its fields")


def _fault(value: Any, type_: Any) -> str | None:
    try:
        msgspec.convert(value, type_, strict=False)
    except msgspec.ValidationError as error:
        return str(error).partition(", got")[0]
    return None
