"""OpenAI's envelope of an error, as the server and every engine answer it."""

from __future__ import annotations

import msgspec

from .errors import ApiError

KINDS = {429: "rate_limit_error"}
"""`type` of an error, where it is not one of the two that most are."""


class ErrorBody(msgspec.Struct):
    """OpenAI's `Error` object."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """The envelope of it."""

    error: ErrorBody


def envelope(error: ApiError) -> bytes:
    """The JSON of an error, as the server and every engine answer it; also what a stream sends that cannot go on."""
    kind = "server_error" if error.status >= 500 else KINDS.get(error.status, "invalid_request_error")
    return msgspec.json.encode(Error(ErrorBody(str(error), kind, error.param, error.code)))
