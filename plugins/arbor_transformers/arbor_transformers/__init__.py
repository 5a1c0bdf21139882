"""Arbor's embedded inference engine, as the server sees it. Light: only the engine's own process imports torch."""

import asyncio
import contextlib
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from arbor_core import Device, hookimpl
from arbor_core.engine import (
    Engine,
    EngineNeeds,
    EngineProcess,
    EngineSpec,
    InferenceBackend,
    Servable,
    UnknownModelError,
    clean_env,
)

NOT_THERE = 4
"""Exit status of `arbor_transformers.hub`."""
FIND_SECONDS = 30.0
"""How long that process may take, even on a busy machine."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `conf/backend/transformers.yaml` says; each key is explained there."""

    share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    adapters: Annotated[int, msgspec.Meta(ge=1)]
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


def is_directory(path: str) -> bool:
    """Whether a path is a directory; False for a hub id.

    Raises:
        UnknownModelError: it is the path of a directory that does not exist.
    """
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise UnknownModelError(f"its directory {path} is not there")
    return Path(path).is_absolute()


class TransformersBackend:
    """Starts engine processes of this package."""

    options = Options

    def needs(self, path: str, options: Mapping[str, Any], devices: Sequence[Device]) -> EngineNeeds:
        """See `arbor_core.InferenceBackend.needs`: one device, or a share of it."""
        return EngineNeeds(share=options["share"], adapters=options["adapters"])

    def serves(self, options: Mapping[str, Any]) -> Servable:
        """See `arbor_core.InferenceBackend.serves`: LoRA of linear layers, and all weights."""
        return Servable(kinds=("linear",))

    async def find(self, path: str) -> None:
        """See `arbor_core.InferenceBackend.find`: a directory at once, a hub id by a process that looks it up."""
        if is_directory(path):
            return
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "arbor_transformers.hub", path), stdin=DEVNULL, stdout=PIPE, env=clean_env()
        )
        try:
            async with asyncio.timeout(FIND_SECONDS):
                reason, _ = await process.communicate()
        except TimeoutError:
            raise UnknownModelError(f"the hub was asked for it and did not answer in {FIND_SECONDS:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # no request waits for the answer any more
                process.kill()
        if process.returncode == NOT_THERE:
            raise UnknownModelError(reason.decode(errors="replace").strip())

    async def start(self, spec: EngineSpec) -> Engine:
        """See `arbor_core.InferenceBackend.start`."""
        return await EngineProcess.start([sys.executable, "-m", "arbor_transformers"], {}, spec)


@hookimpl
def arbor_inference_backends() -> Mapping[str, Callable[[], InferenceBackend]]:
    return {"transformers": TransformersBackend}
