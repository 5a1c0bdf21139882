"""The second door: what plugins import that add routes to the API (`arbor_routes`).

Routes are Litestar handlers. They reach jobs through the `Services` that the hook is given, read what clients send with
`typed`, and answer mistakes with `ApiError`, which leaves the server in OpenAI's envelope. One that waits for news of a
job does so with a `LongPoll`.
"""

from typing import TYPE_CHECKING, Any

from arbor_core.config.convert import explained, typed
from arbor_core.data.message_rules import Rules, read_chat_data, read_message
from arbor_core.models.catalog import strip_provider
from arbor_core.rollouts.completion_ledger import key_of, key_of_tools
from arbor_core.server.http.long_poll import LongPoll
from arbor_core.storage.codec import MAX_DEPTH, too_deep
from arbor_core.types import (
    CLOSE,
    NO_RETRY,
    RETRY_SOON,
    UNNUMBERED,
    ApiError,
    CommandSession,
    ConfigError,
    NamedCheckpoint,
    RolloutSession,
    Services,
    name_of,
    not_found,
)

if TYPE_CHECKING:
    from arbor_core.server.http.requests import query, raw_body


def __getattr__(name: str) -> Any:
    if name not in ("query", "raw_body"):
        raise AttributeError(f"module 'arbor_core.http' has no attribute '{name}'")
    from arbor_core.server.http import requests  # only now Litestar: structs of requests do without it

    return getattr(requests, name)


__all__ = [
    "CLOSE",
    "MAX_DEPTH",
    "NO_RETRY",
    "RETRY_SOON",
    "UNNUMBERED",
    "ApiError",
    "CommandSession",
    "ConfigError",
    "LongPoll",
    "NamedCheckpoint",
    "RolloutSession",
    "Rules",
    "Services",
    "explained",
    "key_of",
    "key_of_tools",
    "name_of",
    "not_found",
    "query",
    "raw_body",
    "read_chat_data",
    "read_message",
    "strip_provider",
    "too_deep",
    "typed",
]
