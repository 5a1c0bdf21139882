"""Serving a model: the process that does it, and the way to start one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct, field

from .devices import Device


class Weights(Struct, frozen=True):
    """Weights that an engine can load under a name: a PEFT adapter."""

    name: str
    path: str
    """Its directory; empty where a sender has sent it."""
    sent: dict[str, Any] | None = None
    """What the backend's sender returned; None: it is a directory."""


class EngineNeeds(Struct, frozen=True):
    """What the engines of one model need, and how much they serve."""

    devices: int = 1
    """Of one engine."""
    share: float = 1.0
    """Fraction of each device's memory that one engine takes, in (0, 1]: engines share a device where theirs fit."""
    adapters: int = 64
    """Adapters that one engine keeps loaded; beyond it the one not used for longest goes."""
    replicas: int = 1
    """Engines that may serve the model side by side; `inference.replicas` of the operator wins."""


class Servable(Struct, frozen=True, kw_only=True):
    """What engines of a backend can load and serve, as far as it can be told before anything is trained."""

    adapters: tuple[str, ...] = ("lora",)
    """Kinds of adapter."""
    full: bool = True
    """Whether they take all weights of a model that was trained."""
    modules: tuple[str, ...] | None = None
    """Names of the modules, without those that hold them, that an adapter may change; None: any."""
    kinds: tuple[str, ...] | None = None
    """Kinds of modules that it may change (`linear`, `embedding`, `convolution`, ...); None: any."""
    dtypes: tuple[str, ...] | None = None
    """Number formats of trained weights; None: any."""


class EngineSpec(Struct, frozen=True):
    """What one engine process serves."""

    model: str
    """Public name of the base model."""
    path: str
    """Directory (or hub id) of its weights. Safetensors only, never remote code."""
    dir: Path
    """The engine's scratch directory."""
    devices: tuple[Device, ...]
    threads: int
    token: str = ""
    """Bearer token the engine demands on every route but /health."""
    options: dict[str, Any] = field(default_factory=dict)
    """The backend's own options, from `conf/backend/<name>.yaml`."""
    version: int | None = None
    """Policy version of the weights, of an engine that is given newer ones while it runs. Where a request asks for
    `return_token_ids`, each choice then says in `policy_version` which was the oldest that sampled any of it."""
    share: float = 1.0
    """Fraction of each device's memory that it may take; the rest is other engines'."""
    sent: dict[str, Any] | None = None
    """Where a sender has sent the weights, what it returned: `path` has those that training began with."""


class Engine(Protocol):
    """A live engine process that speaks OpenAI's HTTP API on loopback."""

    @property
    def url(self) -> str: ...
    @property
    def headers(self) -> dict[str, str]:
        """What every request to it must carry."""
        ...

    async def load_weights(self, weights: Weights) -> None: ...
    async def unload(self, name: str) -> None: ...
    async def update(self, path: str, version: int, sent: Mapping[str, Any] | None = None) -> None:
        """Replace all weights by those of a directory, or those that the backend's sender sent (it returned `sent`),
        between two iterations: requests that run go on with them.

        Raises:
            ArborError: it cannot. Its weights may be mixed now, so that it is killed and started anew from the
                directory; the same is done where a backend knows no such update.
        """
        ...

    async def health(self) -> bool:
        """Whether it lives and answers."""
        ...

    async def stalled_for(self, patience: float) -> float | None:
        """Seconds without progress while it has work; 0 without work.

        None: it did not answer within `patience` seconds.
        """
        ...

    async def wait(self) -> str:
        """Return when the engine has ended, in whatever way; the text says how."""
        ...

    async def stop(self) -> None: ...
    async def kill(self) -> None:
        """End it at once, even if it hangs and ignores SIGTERM; `wait` returns then."""
        ...


class InferenceBackend(Protocol):
    """A way to serve a model.

    One whose engines take policies otherwise than as files has a `sender: str`, `"package.module:function"`, which is
    imported in each rank of a trainer alone and is called with its `Run` to make a `Sender`.
    """

    @property
    def options(self) -> type[Struct]:
        """Struct of its options, whose defaults are in `conf/backend/<name>.yaml`; checked when the server starts."""
        ...

    def needs(self, path: str, options: Mapping[str, Any], devices: Sequence[Device]) -> EngineNeeds:
        """What engines of a model need. Called in the server, before each start.

        Args:
            path: Directory (or hub id) of the weights.
            options: As in `EngineSpec`.
            devices: Those that engines may get.
        """
        ...

    def serves(self, options: Mapping[str, Any]) -> Servable:
        """What its engines can load and serve: jobs whose result they could not are refused before they train."""
        ...

    async def find(self, path: str) -> None:
        """Make sure, within seconds, that there is a model; no device is taken for one that does not exist.

        Raises:
            UnknownModelError: neither the directory exists nor a model of that id.
        """
        ...

    async def start(self, spec: EngineSpec) -> Engine:
        """Start an engine and return when it answers.

        Raises:
            ArborError: it did not start; the message says why.
        """
        ...
