"""What goes wrong in ways that somebody can mend."""

from __future__ import annotations

from collections.abc import Mapping

from .jobs import Desired


class ArborError(Exception):
    """A mistake the user can mend; shown as one line, without a traceback."""


class ConfigError(ArborError, ValueError):
    """A configuration value is wrong. `path` is the key as the user typed it, `code` OpenAI's word for the mistake."""

    def __init__(self, message: str, *, path: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.path, self.code = path, code


class UnknownModelError(ArborError):
    """There is no model where one was said to be. The message says where it was looked for."""


class DevicesLostError(ArborError):
    """A claim that cannot be granted because devices were lost; it can when they are back."""


class JobFailed(ArborError):
    """Raised by a trainer to end its job as `failed`; becomes the job's `error` object.

    Args:
        message: What was tried, what was expected, what to do.
        code: OpenAI's word where there is one (`invalid_training_file`), ours otherwise.
        param: The request's field at fault, if one is.
    """

    def __init__(self, message: str, *, code: str = "training_failed", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class JobStopped(ArborError):
    """Raised inside a trainer (by `Run.stop_if_asked`) when the job is to pause or was cancelled."""

    def __init__(self, desired: Desired) -> None:
        super().__init__(f"the job is asked to {desired}")
        self.desired = desired


class ApiError(ArborError):
    """What a request deserves when it cannot be served.

    Args:
        status: HTTP status. OpenAI's client repeats a request on 408, 409, 429 and from 500 on, so an error that would
            only come again carries `NO_RETRY`.
        message: What was tried, what was expected, what to do.
        code: OpenAI's word where there is one (`model_not_found`), ours otherwise.
        param: The request's field at fault, as a path (`messages[0].role`).
        headers: More response headers, `retry-after` for one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


NO_RETRY = {"x-should-retry": "false"}
"""Tells OpenAI's client that the same request would fail in the same way."""


RETRY_SOON = {"retry-after": "1"}
"""Tells clients that the same request may well succeed in a moment."""


CLOSE = {"connection": "close"}
"""For an answer given before the body was read: what is still being sent is not wanted."""


def not_found(what: str, id: str, code: str = "not_found", param: str | None = "id") -> ApiError:
    """404 for an id that names nothing of the caller's."""
    shown = id if len(id) <= 80 else id[:80] + "…"
    return ApiError(404, f"Could not find {what}: {shown}", code, param)
