"""The one exception that becomes an answer: OpenAI's error envelope with its status."""

from typing import Any


class ApiError(Exception):
    """A request that cannot be served.

    Args:
        message: What was tried, what was expected, what to do.
        code: OpenAI's word for the mistake.
        param: Path of the field at fault, if one is.
        status: HTTP status. From 500 on the fault is ours (`server_error`).
        headers: Sent along (`retry-after`).
    """

    def __init__(
        self,
        message: str,
        code: str,
        param: str | None = None,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.param, self.status = message, code, param, status
        self.headers = headers or {}

    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def queue_full(waiting: int) -> ApiError:
    """Row 135: nothing is queued beyond the limit."""
    message = f"{waiting} sequences are waiting already. Retry in a second, or raise inference.max_waiting."
    return ApiError(message, "rate_limit_exceeded", status=429, headers={"retry-after": "1"})


def numerical() -> ApiError:
    """Row 134: a JSON answer cannot hold NaN, and a retry would give it again."""
    message = "The model's output is not a number (NaN or infinite): its weights, or this adapter's, have diverged."
    return ApiError(message, "engine_numerical_error", status=500, headers={"x-should-retry": "false"})


def stopping() -> ApiError:
    """The process was told to end while the request ran."""
    return ApiError("The engine is shutting down.", "engine_unavailable", status=503, headers={"retry-after": "1"})


def failure(doing: str, error: Exception) -> ApiError:
    """What a client is told of an error of ours."""
    message = f"The engine failed while {doing} ({type(error).__name__}). Its log has the details."
    return ApiError(message, "engine_error", status=500)
