"""The third door: what plugins import that bring an inference backend, on both sides of its process.

For the backend, inside the server: `EngineProcess` starts a process and speaks to it; `clean_env` is the environment of
any other process it starts; `UnknownModelError` says that there is no such model. The types are those of the backend's
contract (`InferenceBackend`, `Engine`, `EngineNeeds`, `EngineSpec`, `Servable`, `Weights`).

For the engine, inside its process, in the order of use: `end_with_parent`, `read_spec`, `routes`, `authorised`,
`Progress`, `health`, `announce`. `read_chat_data` checks a conversation by the server's `Rules`. What it refuses is an
`ApiError`, which `envelope` makes OpenAI's error object of; `NO_RETRY` and `RETRY_SOON` are its headers. `crash_point`
names a place where tests let it die.
"""

from arbor_core.crash_points import crash_point
from arbor_core.data.message_rules import Rules, read_chat_data
from arbor_core.inference.child import Progress, announce, authorised, end_with_parent, health, read_spec, routes
from arbor_core.inference.process import EngineProcess
from arbor_core.process.environment import clean_env
from arbor_core.types import (
    NO_RETRY,
    RETRY_SOON,
    ApiError,
    ConfigError,
    Engine,
    EngineNeeds,
    EngineSpec,
    InferenceBackend,
    Servable,
    UnknownModelError,
    Weights,
    envelope,
)

__all__ = [
    "NO_RETRY",
    "RETRY_SOON",
    "ApiError",
    "ConfigError",
    "Engine",
    "EngineNeeds",
    "EngineProcess",
    "EngineSpec",
    "InferenceBackend",
    "Progress",
    "Rules",
    "Servable",
    "UnknownModelError",
    "Weights",
    "announce",
    "authorised",
    "clean_env",
    "crash_point",
    "end_with_parent",
    "envelope",
    "health",
    "read_chat_data",
    "read_spec",
    "routes",
]
