"""Who calls: every route but those marked `public` needs one of the operator's keys, when there are any."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from .errors import CLOSE, ApiError

DEFAULT_OWNER = "default"
"""Owns everything on a server without keys."""
Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], Awaitable[None]]


def guard(keys: Sequence[str]) -> Guard:
    """A guard that notes the caller in the request's state; it runs before the body is read.

    It is async because Litestar runs any other on a thread, which costs every request more than the guard itself.
    """
    owners = {digest(key): f"key-{digest(key).hex()[:16]}" for key in keys}

    async def require_key(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if handler.opt.get("public"):
            return
        if not owners:
            connection.state.owner = DEFAULT_OWNER
            return
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        given = digest(key.strip())
        matches = [owner for known, owner in owners.items() if hmac.compare_digest(known, given)]
        if scheme.lower() != "bearer" or not matches:
            message = "Incorrect API key provided. Send one of this server's keys: 'Authorization: Bearer KEY'."
            raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer", **CLOSE})
        connection.state.owner = matches[0]

    return require_key


def digest(key: str) -> bytes:
    return sha256(key.encode(errors="surrogateescape")).digest()


async def owner(request: Any) -> str:
    """Dependency `owner`: whose objects a request may see."""
    return str(request.state.owner)
