"""The JSON object that a request's body is."""

from __future__ import annotations

from typing import Any

import msgspec

from arbor_core.types import ApiError


def decoded(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        ApiError: there is none.
    """
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error) if raw else "it is empty"
        raise _not_json(reason) from None
    if not isinstance(value, dict):
        raise _not_json(f"expected an object, got {'null' if value is None else type(value).__name__}")
    return value


def _not_json(reason: str) -> ApiError:
    message = f"We could not parse the JSON body of your request: {reason}. The body must be one JSON object."
    return ApiError(400, message, "invalid_json")
