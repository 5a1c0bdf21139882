"""One base model that is served: its engine, who uses it, and the adapters that are loaded on it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arbor_core.jobdir.weights import reading
from arbor_core.jobs.leases import LeaseEnd
from arbor_core.models.fine_tuned import FullPolicy, Resolved
from arbor_core.types import NO_RETRY, RETRY_SOON, ApiError, ArborError, Engine, Lease, Weights

from .redaction import without_paths

log = logging.getLogger(__name__)

ADAPTERS = 64
"""Adapters that one engine keeps loaded; beyond it the one not used for longest goes."""

Key = tuple[str, str]
"""Public name and path of a base model."""


class WeightsGoneError(ApiError):
    """An adapter is not on the disk any more: a trainer has published newer ones, or somebody has removed it."""

    def __init__(self, name: str) -> None:
        message = f"The model '{name}' cannot be loaded: its weights are not there any more."
        super().__init__(503, message, "engine_unavailable", "model", NO_RETRY)


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
    ending: LeaseEnd = "not_started"
    """Why the lease ends, when it does."""
    watch: asyncio.Task[None] | None = None
    full: FullPolicy | None = None
    """The weights that it has, or that it will have when `updating` ends; None: they never change."""
    updating: asyncio.Task[None] | None = None
    version: int = -1
    """Of the weights that the last update brought; -1: there was none."""
    policies: dict[str, Resolved] = field(default_factory=dict)
    """Of adapters that are a live job's policy, by their names."""
    turns: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """Of each live job: its policies are loaded one after the other."""
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

    def superseded(self) -> bool:
        """Whether its weights have gone because the trainer published newer ones."""
        return self.full is not None and self.full.version > 0 and not Path(self.full.path).exists()

    def adapter(self, weights: Weights) -> asyncio.Task[None]:
        """The loading of an adapter, started by its first user.

        Raises:
            ApiError: (from the task) 503 `engine_unavailable`: the engine refused it; WeightsGoneError: it has gone.
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
            with reading(Path(weights.path)) as there:
                if not there:
                    raise WeightsGoneError(weights.name)
                await engine.load_weights(weights)
        except WeightsGoneError:
            raise
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
        self.policies[name] = resolved
        self.held[name] += 1
        try:
            yield
        finally:
            self.held[name] -= 1
            self.retire()

    def retire(self, ended: str | None = None) -> None:
        """Unload the policies that no request runs on and whose job has a newer one loaded, or is the job `ended`."""
        newest: dict[str | None, int] = {}
        for policy in self.loaded_policies():
            newest[policy.live] = max(policy.version, newest.get(policy.live, 0))
        for name, policy in list(self.policies.items()):
            is_old = policy.version < newest.get(policy.live, 0)
            if not self.held[name] and (is_old or policy.live == ended):
                del self.policies[name], self.held[name]
                if name in self.adapters:
                    self.forget(name)
        if ended:
            self.turns.pop(ended, None)

    def loaded_policies(self) -> list[Resolved]:
        """The policies of live jobs that are loaded."""
        names = (name for name in self.policies if name in self.adapters and succeeded(self.adapters[name]))
        return [self.policies[name] for name in names]

    def ready(self, resolved: Resolved) -> Resolved | None:
        """What is loaded of an adapter: it, or of a live job's policy a newer one; None: it has to be loaded."""
        if resolved.adapter is None:
            return resolved
        loading = self.adapters.get(resolved.adapter.name)
        if loading and succeeded(loading) and self.paths[resolved.adapter.name] == resolved.adapter.path:
            return resolved
        later = (one for one in self.loaded_policies() if one.live == resolved.live and one.version > resolved.version)
        return max(later, key=lambda policy: policy.version, default=None)

    def update(self, full: FullPolicy, newest: Callable[[], FullPolicy | None]) -> asyncio.Task[None] | None:
        """The update to these weights or newer ones, started by its first user; None: the engine has them.

        Args:
            newest: Looks up the newest weights, for the case that these have gone.

        Raises:
            ArborError: (from the task) the engine did not take them.
        """
        if self.full is None or full.version > self.full.version:
            self.updating = asyncio.create_task(self._update(full, self.updating, newest))
            self.updating.add_done_callback(ignore_result)
            self.full = full
        return self.updating

    async def _update(
        self, full: FullPolicy, before: asyncio.Task[None] | None, newest: Callable[[], FullPolicy | None]
    ) -> None:
        engine = await self.start
        if before:
            await before
        if self.version >= full.version:
            return
        with self.reading_newest(newest) as weights:
            await engine.update(weights.path, weights.version)
            self.version = weights.version

    @contextmanager
    def reading_newest(self, newest: Callable[[], FullPolicy | None]) -> Iterator[FullPolicy]:
        """The newest weights, which their trainer does not remove inside the block.

        Raises:
            ArborError: they have gone, and there are none that are newer.
        """
        assert self.full is not None
        with ExitStack() as held:
            while self.full.version > 0 and not held.enter_context(reading(Path(self.full.path))):
                newer = newest()
                if newer is None or newer.version <= self.full.version:
                    raise ArborError(f"the weights of policy version {self.full.version} are not there any more")
                self.full = newer
            yield self.full

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


def succeeded(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and not task.exception()


def ignore_result(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from complaining of a failure that nobody waits for any more; it was logged where it happened."""
    if not task.cancelled():
        task.exception()
