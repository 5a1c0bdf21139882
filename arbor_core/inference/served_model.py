"""One base model that is served: its engine, who uses it, and the adapters that are loaded on it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arbor_core.models.fine_tuned import FullPolicy, Resolved
from arbor_core.types import NO_RETRY, RETRY_SOON, ApiError, ArborError, Engine, Lease, Weights

from .redaction import without_paths

log = logging.getLogger(__name__)

ADAPTERS = 64
"""Adapters that one engine keeps loaded; beyond it the one not used for longest goes."""

CHECKS = 4
"""An engine hangs when it shows no sign of life in this number of checks in a row."""

Key = tuple[str, str]
"""Public name and path of a base model."""


@dataclass(eq=False)
class ServedModel:
    """A base model with the engine that serves it, or is about to."""

    key: Key
    start: asyncio.Task[Engine]
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    adapters: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Loading or loaded, in order of use."""
    unloading: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """On their way out, by name."""
    paths: dict[str, str] = field(default_factory=dict)
    """From where each adapter was loaded."""
    dir: Path | None = None
    lease: Lease | None = None
    watch: asyncio.Task[None] | None = None
    full: FullPolicy | None = None
    """The weights that it has, or that it will have when `updating` ends; None: they never change."""
    updating: asyncio.Task[None] | None = None
    version: int = -1
    """Of the weights that the last update brought; -1: there was none."""
    policies: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Of adapters that are a live job's policy: the job and the version."""
    held: Counter[str] = field(default_factory=Counter)
    """Requests that run on each of those, or wait for it."""

    @property
    def engine(self) -> Engine | None:
        """The engine, if it has started."""
        return self.start.result() if succeeded(self.start) else None

    @property
    def idle(self) -> bool:
        """Whether it runs and nobody uses it."""
        return self.users == 0 and self.watch is not None

    def superseded(self, path: str) -> bool:
        """Whether the weights at a path have gone because the trainer published newer ones."""
        return self.full is not None and self.full.version > 0 and not Path(path).exists()

    def adapter(self, weights: Weights) -> asyncio.Task[None]:
        """The loading of an adapter, started by its first user.

        Raises:
            ApiError: (from the task) 503 `engine_unavailable`: the engine refused it.
        """
        if weights.name in self.adapters and self.paths[weights.name] != weights.path:
            self.forget(weights.name)  # its step was trained again
        self.paths[weights.name] = weights.path
        loading = self.adapters.pop(weights.name, None)
        if loading is None or (loading.done() and not succeeded(loading)):
            loading = asyncio.create_task(self._load(weights))
            loading.add_done_callback(ignore_result)
        self.adapters[weights.name] = loading  # the last in use is the last in order
        if len(self.adapters) > ADAPTERS:
            self.forget(next(iter(self.adapters)))
        return loading

    async def _load(self, weights: Weights) -> None:
        if unloading := self.unloading.get(weights.name):
            await asyncio.wait({unloading})
        engine = await self.start
        try:
            await engine.load_weights(weights)
        except ArborError as error:
            log.warning("adapter %s: %s", weights.name, error)
            message = f"The model '{weights.name}' cannot be loaded: {without_paths(str(error), weights.path)}"
            again = NO_RETRY if await engine.health() else RETRY_SOON  # the next request starts another engine
            raise ApiError(503, message, "engine_unavailable", "model", again) from None

    @contextmanager
    def holding(self, resolved: Resolved) -> Iterator[None]:
        """Keep a policy loaded for a request that runs on it; older ones of its job go when no request runs on them."""
        if resolved.adapter is None or resolved.live is None:
            yield
            return
        name = resolved.adapter.name
        self.policies[name] = (resolved.live, resolved.version)
        self.held[name] += 1
        try:
            yield
        finally:
            self.held[name] -= 1
            self.retire()

    def retire(self, ended: str | None = None) -> None:
        """Unload the policies that no request runs on and whose job has a newer one loaded, or is the job `ended`."""
        newest: dict[str, int] = {}
        for name, (job_id, version) in self.policies.items():
            if name in self.adapters and succeeded(self.adapters[name]):
                newest[job_id] = max(version, newest.get(job_id, 0))
        for name, (job_id, version) in list(self.policies.items()):
            if not self.held[name] and (job_id == ended or version < newest.get(job_id, 0)):
                del self.policies[name], self.held[name]
                if name in self.adapters:
                    self.forget(name)

    def update(self, full: FullPolicy) -> asyncio.Task[None] | None:
        """The update to these weights or newer ones, started by its first user; None: the engine has them.

        Raises:
            ArborError: (from the task) the engine did not take them.
        """
        if self.full is None or full.version > self.full.version:
            self.updating = asyncio.create_task(self._update(full, self.updating))
            self.updating.add_done_callback(ignore_result)
            self.full = full
        return self.updating

    async def _update(self, full: FullPolicy, before: asyncio.Task[None] | None) -> None:
        engine = await self.start
        if before:
            await before
        if self.version >= full.version:
            return
        newest = self.full or full  # the trainer removes old ones while an update lasts
        await engine.update(newest.path, newest.version)
        self.version = newest.version

    def forget(self, name: str) -> None:
        """Unload an adapter. Requests that run on it finish first; new ones load it again."""
        self.unloading[name] = asyncio.create_task(self._unload(name, self.adapters.pop(name)))

    async def _unload(self, name: str, loading: asyncio.Task[None]) -> None:
        try:
            await loading
            await (await self.start).unload(name)
        except ArborError as error:
            log.warning("unloading %s: %s", name, error)
        finally:
            del self.unloading[name]


async def kill_when_it_hangs(model: str, engine: Engine, seconds: float) -> None:
    """End an engine as soon as it hangs."""
    how = await hanging(engine, seconds)
    log.warning("engine of %s %s for %g s and is killed", model, how, seconds)
    await engine.kill()


async def hanging(engine: Engine, seconds: float) -> str:
    """Return when an engine has shown no sign of life for `seconds`; the text says which one was missed.

    Checks are counted and no clocks compared: after this server or the machine stood still, no engine is to blame.
    """
    pause, missed = seconds / CHECKS, 0
    while True:
        stalled, _ = await asyncio.gather(engine.stalled_for(pause), asyncio.sleep(pause))
        missed = missed + 1 if stalled is None or stalled >= pause else 0
        if missed == CHECKS:
            return "does not answer" if stalled is None else "makes no progress with its work"


def succeeded(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and not task.exception()


def ignore_result(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from complaining of a failure that nobody waits for any more; it was logged where it happened."""
    if not task.cancelled():
        task.exception()
