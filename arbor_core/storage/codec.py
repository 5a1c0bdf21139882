"""Structs as JSON and back, and how deep JSON may be nested."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
MAX_DEPTH = 64
"""Arrays and objects within one another in JSON that others read again. Decoders give up at about 1,000, less what is
on the stack: what one process has just read, another may not be able to."""


def too_deep(value: Any) -> bool:
    """Whether more than `MAX_DEPTH` arrays and objects are nested in a value, itself included."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, CONTAINERS)]
        if not inner:
            return False
        level = [item for items in inner for item in items]
    return True


CONTAINERS = (Mapping, list, tuple)


def check_depth(value: Any, what: str) -> None:
    """Refuse a value that is too deep.

    Raises:
        ValueError: it is; `what` says where.
    """
    if too_deep(value):
        raise ValueError(f"{what} is nested too deeply: more than {MAX_DEPTH} levels")


def shallow(raw: str) -> Any:
    """JSON that was stored, to be shown. An empty object in place of one that is nested too deeply."""
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        return {}
    return {} if too_deep(value) else value


def encode(record: Any) -> bytes:
    """A record as JSON, its paths as text."""
    return msgspec.json.encode(record, enc_hook=_path_as_text)


def decode(content: bytes, type_: type[T]) -> T:
    """What `encode` wrote.

    Raises:
        msgspec.DecodeError: it is not a `type_`.
    """
    return msgspec.json.decode(content, type=type_, dec_hook=_text_as_path)


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"cannot write a {type(value).__name__} as JSON")


def _text_as_path(wanted: type[Any], value: Any) -> Any:
    if wanted is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"cannot read a {wanted.__name__} from JSON")
