"""Who calls: every route but those marked `public` needs one of the operator's keys, when there are any.

Each route names what a key must be for (`scopes` in its `opt`); one that names nothing needs an admin's.
"""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from arbor_core.config.api_keys import DEFAULT_OWNER, ApiKey, Scope, digest
from arbor_core.config.settings import LimitsConfig
from arbor_core.types import CLOSE, ApiError

ADMIN: tuple[Scope, ...] = ("admin",)
TRAIN: tuple[Scope, ...] = ("train",)
INFER: tuple[Scope, ...] = ("infer",)
ANY: tuple[Scope, ...] = ("train", "infer")
Connection = ASGIConnection[Any, Any, Any, Any]
Guard = Callable[[Connection, BaseRouteHandler], Awaitable[None]]


class Bucket:
    """A token bucket: `rate` tokens come in a second, and those of one second (at least one) can be saved."""

    def __init__(self, rate: float) -> None:
        self.rate, self.size = rate, max(1.0, rate)
        self.level, self.at = self.size, time.monotonic()

    def take(self) -> float:
        """Take a token; returns 0, or the seconds until there is one."""
        now = time.monotonic()
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.rate), now
        if self.level < 1:
            return (1 - self.level) / self.rate
        self.level -= 1
        return 0.0


class Caller:
    """The holder of one key, and what they have used of their limits. Without keys everybody is one caller."""

    def __init__(self, name: str, owner: str, scopes: Sequence[Scope], limits: LimitsConfig) -> None:
        self.name, self.owner, self.scopes, self.limits = name, owner, frozenset(scopes), limits
        self.bucket = Bucket(limits.requests_per_second) if limits.requests_per_second else None
        self.answering = 0
        """Completions that are being waited for."""

    def spend(self) -> None:
        """Count a request.

        Raises:
            ApiError: 429: there were too many.
        """
        if self.bucket and (seconds := self.bucket.take()):
            limit = f"{self.bucket.rate:g} requests a second for each key (limits.requests_per_second)"
            raise _too_many(f"This server takes {limit}.", math.ceil(seconds), CLOSE)

    @contextmanager
    def completion(self) -> Iterator[None]:
        """Count a completion while it is answered.

        Raises:
            ApiError: 429: there are too many.
        """
        limit = self.limits.inference_requests
        if limit is not None and self.answering >= limit:
            message = f"This server answers {limit} completions at a time for each key (limits.inference_requests)."
            raise _too_many(message, 1)
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1

    def require(self, scopes: Sequence[Scope]) -> None:
        """Refuse what the key is not for.

        Raises:
            ApiError: 403.
        """
        if "admin" not in self.scopes and not self.scopes & set(scopes):
            has, needs = ", ".join(sorted(self.scopes)), " or ".join(dict.fromkeys((*scopes, *ADMIN)))
            message = (
                f"You have insufficient permissions for this operation: it needs the scope {needs}, yours is {has}."
            )
            raise ApiError(403, message, "insufficient_permissions", headers=CLOSE)


def _too_many(message: str, seconds: int, headers: dict[str, str] | None = None) -> ApiError:
    wait = {"retry-after": str(seconds), **(headers or {})}
    return ApiError(429, f"{message} Try again in {seconds} s.", "rate_limit_exceeded", headers=wait)


def guard(keys: Sequence[ApiKey], limits: LimitsConfig, *, insecure: bool = False) -> Guard:
    """A guard that notes the caller in the request's state; it runs before the body is read.

    Without keys it refuses what a web page has a browser send, unless everybody may come (`insecure`). It is async
    because Litestar runs any other on a thread, which costs every request more than the guard itself.
    """
    callers = [((key.sha256 or "").encode(), Caller(key.name, key.owner, key.scopes, limits)) for key in keys]
    anybody = Caller("anybody", DEFAULT_OWNER, ADMIN, limits)

    async def admit(connection: Connection, handler: BaseRouteHandler) -> None:
        if handler.opt.get("public"):
            return
        if not callers and not insecure:
            refuse_web_pages(connection.headers)
        caller = identified(connection.headers.get("authorization", ""), callers) if callers else anybody
        caller.spend()
        caller.require(handler.opt.get("scopes", ADMIN))
        connection.state.caller = caller

    return admit


def identified(header: str, callers: Sequence[tuple[bytes, Caller]]) -> Caller:
    """The caller who presents a key. All hashes are compared, so that time tells nothing.

    Raises:
        ApiError: 401: nobody has such a key.
    """
    scheme, _, key = header.partition(" ")
    given = digest(key.strip()).encode()
    matches = [caller for known, caller in callers if hmac.compare_digest(known, given)]
    if scheme.lower() != "bearer" or not matches:
        message = "Incorrect API key provided. Send one of this server's keys: 'Authorization: Bearer KEY'."
        raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer", **CLOSE})
    return matches[0]


def refuse_web_pages(headers: Mapping[str, str]) -> None:
    """Without keys whoever is on this machine may use the server; pages that their browser shows may not.

    A page of another site names itself in `Origin`. One whose name was made to lead to this machine (DNS rebinding)
    counts as the same site for the browser, and is known by `Host`.

    Raises:
        ApiError: 403.
    """
    for name, value in (("Host", headers.get("host")), ("Origin", headers.get("origin"))):
        if value and not is_loopback(value.rpartition("//")[2]):
            message = (
                f"This server has no keys and is for this machine alone, but the request's {name} is '{value[:80]}'. "
                "Set auth.keys, or auth.insecure=true if you mean it."
            )
            raise ApiError(403, message, "forbidden_origin", headers=CLOSE)


@lru_cache(256)
def is_loopback(authority: str) -> bool:
    """Whether `host:port` names this machine and cannot name another."""
    try:
        host = urlsplit(f"//{authority}").hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ip_address(host).is_loopback
    except ValueError:  # neither a name that we know nor an address
        return False


def caller_of(connection: Connection) -> Caller:
    """Who made a request that was admitted."""
    caller: Caller = connection.state.caller
    return caller


async def owner(request: Any) -> str:
    """Dependency `owner`: whose objects a request may see."""
    return caller_of(request).owner
