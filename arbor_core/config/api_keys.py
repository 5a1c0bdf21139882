"""API keys: who calls, and what for. A key is hashed when it is read from the configuration; nobody keeps the key."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Scope = Literal["admin", "train", "infer"]
"""What a key is for: `train` is files, jobs and models, `infer` completions; `admin` is everything."""
Key = Annotated[str, Meta(pattern=r"^[!-~]+$")]
"""What a header can carry; an empty key would let everybody in."""
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


DEFAULT_OWNER = "default"
"""Owns everything on a server without keys."""


class ApiKey(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of `auth.keys`: `{name, key or sha256, scopes, tenant}`."""

    name: Name
    scopes: Annotated[list[Scope], Meta(min_length=1)]
    key: Key | None = None
    """Always None in the end: `sha256` stands for it."""
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")] | None = None
    tenant: Name | None = None
    """Whose objects the key sees and makes. None: nobody else's, its own."""

    def __post_init__(self) -> None:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"the key '{self.name}' needs either 'key' or 'sha256'")
        if self.key is not None:
            self.sha256, self.key = digest(self.key), None

    @property
    def owner(self) -> str:
        """What the database calls the tenant."""
        return self.tenant or f"key-{(self.sha256 or '')[:16]}"


def entries(keys: Sequence[str | ApiKey]) -> list[ApiKey]:
    """The configured keys, each with its hash. A plain secret may do everything.

    Raises:
        ValueError: two are the same, or have the same name.
    """
    found = [ApiKey(f"key-{digest(key)[:16]}", ["admin"], key=key) if isinstance(key, str) else key for key in keys]
    for values, what in (([k.name for k in found], "name"), ([k.sha256 for k in found], "key")):
        if len(set(values)) < len(values):
            raise ValueError(f"two entries have the same {what}")
    return found


def digest(key: str) -> str:
    """SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def new() -> str:
    """A key that nobody can guess."""
    return f"sk-arbor-{secrets.token_urlsafe(32)}"
