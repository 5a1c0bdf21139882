"""What goes wrong while an answer is generated, as errors in OpenAI's terms."""

from arbor_core.engine import NO_RETRY, RETRY_SOON, ApiError


def queue_full(waiting: int) -> ApiError:
    """Row 135: nothing is queued beyond the limit."""
    message = f"{waiting} sequences are waiting already. Retry in a second, or raise inference.max_waiting."
    return ApiError(429, message, "rate_limit_exceeded", headers=RETRY_SOON)


def numerical() -> ApiError:
    """Row 134: a JSON answer cannot hold NaN, and a retry would give it again."""
    message = "The model's output is not a number (NaN or infinite): its weights, or this adapter's, have diverged."
    return ApiError(500, message, "engine_numerical_error", headers=NO_RETRY)


def stopping() -> ApiError:
    """The process ends while the request runs."""
    return ApiError(503, "The engine is shutting down.", "engine_unavailable", headers=RETRY_SOON)


def failure(doing: str, error: Exception) -> ApiError:
    """What a client may know of an error that is not its own."""
    message = f"The engine failed while {doing} ({type(error).__name__}). Its log has the details."
    return ApiError(500, message, "engine_error")
