"""The third door: what plugins import that bring an inference backend, on both sides of its process.

The server's side starts an `EngineProcess`; the process reads its specification (`read_spec`), says where it listens
with `replace`, and ends with the server (`prctl`).
"""

from arbor_core.inference.process import EngineProcess, read_spec
from arbor_core.process.environment import clean_env
from arbor_core.process.prctl import PR_SET_PDEATHSIG, prctl
from arbor_core.storage.atomic import replace
from arbor_core.types import (
    NO_RETRY,
    RETRY_SOON,
    ApiError,
    Engine,
    EngineSpec,
    InferenceBackend,
    UnknownModelError,
    Weights,
    envelope,
)

__all__ = [
    "NO_RETRY",
    "PR_SET_PDEATHSIG",
    "RETRY_SOON",
    "ApiError",
    "Engine",
    "EngineProcess",
    "EngineSpec",
    "InferenceBackend",
    "UnknownModelError",
    "Weights",
    "clean_env",
    "envelope",
    "prctl",
    "read_spec",
    "replace",
]
