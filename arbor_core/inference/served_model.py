"""One engine: who uses it, which adapters are loaded on it, and which weights it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from arbor_core.jobdir.weights import reading
from arbor_core.jobs.leases import LeaseEnd
from arbor_core.models.fine_tuned import FullPolicy
from arbor_core.types import ArborError, Engine, EngineNeeds, Lease

from .adapters import Adapters, ignore_result, succeeded
from .backends import Backend


class Key(NamedTuple):
    """Which engine: the public name and the path of its base model, and which of those that serve it."""

    name: str
    path: str
    replica: int = 0


class ServedModel:
    """A base model with an engine that serves it, or is about to.

    Args:
        start: Begins to start the engine.
        full: The weights that it begins with, where a job's own engine serves a policy of all weights.
        extra: Other engines serve the model already: it makes no other engine end, and its failure is nobody's.
    """

    def __init__(
        self,
        key: Key,
        backend: Backend,
        needs: EngineNeeds,
        start: Callable[[ServedModel], asyncio.Task[Engine]],
        full: FullPolicy | None,
        extra: bool,
    ) -> None:
        self.key, self.backend, self.needs, self.extra = key, backend, needs, extra
        self.users, self.used_at = 0, time.monotonic()
        self.dir: Path | None = None
        self.lease: Lease | None = None
        self.ending: LeaseEnd = "not_started"
        """Why the lease ends, when it does."""
        self.watch: asyncio.Task[None] | None = None
        self.full = full
        """The weights that it has, or that it will have when `updating` ends; None: they never change."""
        self.updating: asyncio.Task[None] | None = None
        self.version = -1
        """Of the weights that the last update brought; -1: there was none."""
        self.start = start(self)
        self.start.add_done_callback(ignore_result)
        self.adapters = Adapters(self._started, needs.adapters)

    async def _started(self) -> Engine:
        return await self.start

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
        return self.full is not None and self.full.stored and not Path(self.full.path).exists()

    def update(self, full: FullPolicy, newest: Callable[[], FullPolicy | None]) -> asyncio.Task[None] | None:
        """The update to these weights or newer ones, started by its first user; None: the engine has them.

        Args:
            newest: Finds the newest weights, for the case that these have gone.

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
            if weights.sent is None:
                await engine.update(weights.path, weights.version)
            else:
                await engine.update(weights.path, weights.version, weights.sent)
            self.version = weights.version

    @contextmanager
    def reading_newest(self, newest: Callable[[], FullPolicy | None]) -> Iterator[FullPolicy]:
        """The newest weights, which their trainer does not remove inside the block.

        Raises:
            ArborError: they have gone, and there are none that are newer.
        """
        assert self.full is not None
        with ExitStack() as held:
            while self.full.stored and not held.enter_context(reading(Path(self.full.path))):
                newer = newest()
                if newer is None or newer.version <= self.full.version:
                    raise ArborError(f"the weights of policy version {self.full.version} are not there any more")
                self.full = newer
            yield self.full
