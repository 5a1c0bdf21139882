"""The error that reaches a client of the API with a status and a code of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .types import ArborError


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


_PATH = re.compile(r"""(?<![\w.:/\\])/(?:[^\s/'"`:;,()\[\]<>]+/)+([^\s/'"`:;,()\[\]<>]*)""")
"""An absolute path of two parts or more; not a URL, which has something before its first slash."""


def without_paths(text: str, *known: str) -> str:
    """A message of an engine as a client may read it: of every path on this machine, only the last name is left.

    Args:
        known: Paths that may be in it and may hold spaces, which no pattern would find the end of.
    """
    for path in filter(None, known):
        if len(Path(path).parts) > 2:
            text = text.replace(path, Path(path).name).replace(str(Path(path).parent), "...")
    return _PATH.sub(r"\1", text)
