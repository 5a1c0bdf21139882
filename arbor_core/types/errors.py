"""What goes wrong in ways that somebody can mend."""

from __future__ import annotations

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
