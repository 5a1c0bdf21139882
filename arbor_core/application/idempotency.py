"""Requests that come twice: a client that received no response sends its request again, and must not get two jobs.

A client names its request (`Idempotency-Key`), or says that it tries again (`x-stainless-retry-count`, as OpenAI's
does). The response is stored in the transaction that creates the job, so there is never one without the other.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Self

import msgspec

from arbor_core.types import ApiError

NAMED_SECONDS = 24 * 3600
"""How long the response to a request with a key is kept."""
UNNAMED_SECONDS = 15 * 60
"""How long a retry without a key finds the first request, by its body."""
MAX_CHARS = 255
KEY, RETRY = "idempotency-key", "x-stainless-retry-count"
Query = Callable[..., sqlite3.Row | None]


class RepeatedError(Exception):
    """The request came before: undoes the transaction, and holds the response to the first one."""

    def __init__(self, response: bytes) -> None:
        super().__init__("the request came before")
        self.response = response


class Repeatable(msgspec.Struct, frozen=True):
    """Identifies a request that may have come before."""

    caller: str
    key: str
    body: bytes
    """SHA-256 of the request, its fields in a fixed order."""
    look_up: bool
    """Whether there may be an earlier one."""
    seconds: int
    """How long the response is kept."""

    @classmethod
    def of(cls, caller: str, request: msgspec.Struct, headers: Mapping[str, str]) -> Self:
        """Read the headers.

        Raises:
            ApiError: the key is empty, too long, or not ASCII.
        """
        body = hashlib.sha256(msgspec.json.encode(request, order="sorted")).digest()
        if (key := headers.get(KEY)) is not None:
            if not 0 < len(key) <= MAX_CHARS or not key.isascii() or not key.isprintable():
                message = f"Invalid 'Idempotency-Key': expected 1 to {MAX_CHARS} printable ASCII characters."
                raise ApiError(400, message, "invalid_value", "Idempotency-Key")
            return cls(caller, f"key {key}", body, True, NAMED_SECONDS)
        tried = headers.get(RETRY, "")
        return cls(caller, f"body {body.hex()}", body, tried.isdigit() and tried.strip("0") != "", UNNAMED_SECONDS)

    def earlier_response(self, one: Query) -> bytes | None:
        """The response to the first request with the same key, or to the same request before a retry.

        Args:
            one: Gets the first row of a query.

        Raises:
            ApiError: the key was used for something else.
        """
        sql = "SELECT body, response FROM repeats WHERE caller=? AND key=? AND expires_at>?"
        row = one(sql, self.caller, self.key, int(time.time())) if self.look_up else None
        if row is None:
            return None
        if row["body"] != self.body:
            message = "This Idempotency-Key came with another body before. Use a new key for a new request."
            raise ApiError(400, message, "idempotency_key_reuse", "Idempotency-Key")
        return bytes(row["response"])

    def remember(self, db: sqlite3.Connection, response: bytes) -> None:
        """Store the response and delete expired ones; part of the caller's transaction.

        Raises:
            RepeatedError: another request of the same kind was faster.
        """
        if earlier := self.earlier_response(lambda sql, *values: db.execute(sql, values).fetchone()):
            raise RepeatedError(earlier)
        now = int(time.time())
        db.execute("DELETE FROM repeats WHERE expires_at<=?", (now,))
        db.execute(
            "INSERT OR REPLACE INTO repeats(caller,key,body,response,expires_at) VALUES(?,?,?,?,?)",
            (self.caller, self.key, self.body, response, now + self.seconds),
        )
