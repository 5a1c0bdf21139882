"""Arbor's embedded inference engine, as the server sees it. Light: only the engine's own process imports torch."""

import sys
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from arbor_core import Engine, EngineProcess, EngineSpec, InferenceBackend, hookimpl


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `conf/backend/transformers.yaml` says; each key is explained there."""

    max_batch: int
    max_waiting: int
    max_cached_tokens: int | None
    prefill_tokens: int
    max_unread: int
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attention: Literal["auto", "sdpa", "eager"]

    def __post_init__(self) -> None:
        for key in ("max_batch", "max_waiting", "max_cached_tokens", "prefill_tokens", "max_unread"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")


class TransformersBackend:
    """Starts engine processes of this package."""

    options = Options

    async def start(self, spec: EngineSpec) -> Engine:
        """See `arbor_core.InferenceBackend.start`."""
        return await EngineProcess.start([sys.executable, "-m", "arbor_transformers"], {}, spec)


@hookimpl
def arbor_inference_backends() -> Mapping[str, Callable[[], InferenceBackend]]:
    return {"transformers": TransformersBackend}
