"""Ids: random, of one alphabet, and checked before they touch the database or the disk."""

from __future__ import annotations

import re
import secrets

from .types import not_found

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
LENGTH = 24
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def new(prefix: str) -> str:
    """`prefix` and 24 random characters: `new("ftjob-")`."""
    number = secrets.randbelow(len(ALPHABET) ** LENGTH)
    letters = []
    for _ in range(LENGTH):
        number, letter = divmod(number, len(ALPHABET))
        letters.append(ALPHABET[letter])
    return prefix + "".join(letters)


def plausible(text: str) -> bool:
    """Whether `text` could be an id of ours."""
    return _ID.fullmatch(text) is not None and ".." not in text


def require(id: str, what: str, code: str = "not_found", param: str | None = "id") -> str:
    """An id that may be looked up.

    Raises:
        ApiError: 404: nothing of ours looks like that.
    """
    if not plausible(id):
        raise not_found(what, id, code, param)
    return id
