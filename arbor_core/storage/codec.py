"""Structs as JSON and back, and how deep JSON may be nested."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from .event_log import T

DEEPEST = 64
"""Levels of lists and objects in a message or tool. Where Python's own limit is met depends on who reads them."""


def check_depth(value: Any, what: str) -> None:
    """Whether lists and objects are nested in a value no more than `DEEPEST` levels deep.

    Raises:
        ValueError: they are; `what` says where.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        nested = [each for each in level if isinstance(each, Mapping | list | tuple)]
        if not nested:
            return
        level = [item for each in nested for item in (each.values() if isinstance(each, Mapping) else each)]
    raise ValueError(f"{what} is nested too deeply: more than {DEEPEST} levels")


NESTED = 64
"""Arrays and objects within one another in JSON that others read again. Decoders give up at some 1,000, less what is on
the stack: what one process has just read another may not be able to."""


def nested(value: Any, most: int = NESTED) -> bool:
    """Whether there are more than so many arrays and objects within one another."""
    within = [value]
    for _ in range(most + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in within if isinstance(one, dict | list)]
        if not inner:
            return False
        within = [value for values in inner for value in values]
    return True


def shallow(raw: str) -> Any:
    """JSON that was stored, to be shown. An empty object in place of one that is nested too deeply."""
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        return {}
    return {} if nested(value) else value


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
