"""What a request may say of an adapter that it trains further."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from arbor_core.config.convert import merged
from arbor_core.types import ConfigError


def continuing(given: Mapping[str, Any], fixed: Mapping[str, Any], where: str, parent: str | None) -> dict[str, Any]:
    """What a request says, and what the adapter that it goes on with has settled.

    Args:
        fixed: That, in the words of the trainer's configuration.
        where: The path of what the client gave, for messages.
        parent: The public name of the adapter.

    Raises:
        ConfigError: they differ.
    """
    for key, settled in fixed.items():
        if key not in given:
            continue
        value, path = given[key], f"{where}.{key}"
        if isinstance(settled, Mapping) and isinstance(value, Mapping):
            continuing(value, settled, path, parent)
        elif not same(value, settled):
            message = (
                f"Invalid '{path}': {json.dumps(value)}: '{parent}', which the job trains further, has "
                f"{json.dumps(settled)}. Leave it out, or begin with the base model."
            )
            raise ConfigError(message, path=path)
    return merged(fixed, given)


def same(value: Any, settled: Any) -> bool:
    """Whether two values mean the same; the order of a list of names means nothing."""
    if isinstance(value, list) and isinstance(settled, list):
        return sorted(map(str, value)) == sorted(map(str, settled))
    return bool(value == settled)
