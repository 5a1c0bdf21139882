"""The adapters that one engine has loaded, or is about to: results of jobs, and policies of jobs that learn."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from arbor_core.jobdir.weights import reading
from arbor_core.models.fine_tuned import Resolved
from arbor_core.types import NO_RETRY, RETRY_SOON, ApiError, ArborError, Engine, Weights

from .redaction import without_paths

log = logging.getLogger(__name__)

Newest = Callable[[str], Resolved | None]
"""Finds the newest policy of a job that learns or has learned from rollouts."""


class WeightsGoneError(ApiError):
    """An adapter is not on the disk any more: a trainer has published newer ones, or somebody has removed it."""

    def __init__(self, name: str) -> None:
        message = f"The model '{name}' cannot be loaded: its weights are not there any more."
        super().__init__(503, message, "engine_unavailable", "model", NO_RETRY)


class Adapters:
    """The adapters of one engine.

    Args:
        engine: Waits until the engine has started.
        limit: Adapters that are kept loaded; beyond it the one not used for longest goes.
    """

    def __init__(self, engine: Callable[[], Awaitable[Engine]], limit: int) -> None:
        self.engine, self.limit = engine, limit
        self.loading: dict[str, asyncio.Task[None]] = {}
        """Loading or loaded, in order of use."""
        self.unloading: dict[str, asyncio.Task[None]] = {}
        """On their way out, by name."""
        self.paths: dict[str, str] = {}
        """From where each was loaded."""
        self.policies: dict[str, Resolved] = {}
        """Of those that are a live job's policy, by their names."""
        self.held: Counter[str] = Counter()
        """Requests that run on each of those, or wait for it."""
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Of each live job: its policies are loaded one after the other."""

    def __contains__(self, name: str) -> bool:
        return name in self.loading

    def load(self, weights: Weights) -> asyncio.Task[None]:
        """The loading of an adapter, started by its first user.

        Raises:
            ApiError: (from the task) 503 `engine_unavailable`: the engine refused it; WeightsGoneError: it has gone.
        """
        if weights.name in self.loading and self.paths[weights.name] != weights.path:
            self.forget(weights.name)  # its step was trained again
        self.paths[weights.name] = weights.path
        loading = self.loading.pop(weights.name, None)
        if loading is None or (loading.done() and not succeeded(loading)):
            loading = asyncio.create_task(self._load(weights))
            loading.add_done_callback(ignore_result)
        self.loading[weights.name] = loading  # the last in use is the last in order
        if len(self.loading) > self.limit:
            self.forget(next(iter(self.loading)))
        return loading

    async def _load(self, weights: Weights) -> None:
        if unloading := self.unloading.get(weights.name):
            await asyncio.wait({unloading})
        engine = await self.engine()
        try:
            with reading(Path(weights.path)) if weights.sent is None else nullcontext(True) as there:
                if not there:
                    raise WeightsGoneError(weights.name)
                await engine.load_weights(weights)
        except WeightsGoneError:
            raise
        except ArborError as error:
            log.warning("adapter %s: %s", weights.name, error)
            message = f"The model '{weights.name}' cannot be loaded: {without_paths(str(error), weights.path)}"
            # what a sender has sent is sent again by the next attempt, and the next request starts another engine
            again = NO_RETRY if weights.sent is None and await engine.health() else RETRY_SOON
            raise ApiError(503, message, "engine_unavailable", "model", again) from None

    async def ready(self, resolved: Resolved, newest: Newest, held: ExitStack) -> Resolved:
        """Load an adapter; returns it, or a newer policy of its job where it has to be loaded and is not the newest.

        Requests that wait for policies of one job share the newest, whatever the pace at which it is published.

        Args:
            held: Keeps a newer policy loaded, as `holding` does.
        """
        assert resolved.adapter is not None
        if resolved.live is None or self._loaded(resolved) == resolved:
            await asyncio.shield(self.load(resolved.adapter))
            return resolved
        async with self.turns[resolved.live]:
            while True:
                policy = self._loaded(resolved) or newest(resolved.live) or resolved
                assert policy.adapter is not None
                held.enter_context(self.holding(policy))
                try:
                    await asyncio.shield(self.load(policy.adapter))
                except ApiError as error:
                    is_gone = isinstance(error, WeightsGoneError) or policy.adapter.sent is not None
                    if not is_gone or (newest(resolved.live) or resolved) == policy:
                        raise
                else:
                    self.retire()
                    return policy

    def _loaded(self, resolved: Resolved) -> Resolved | None:
        """A policy if it is loaded, or a newer one of its job that is."""
        weights = resolved.adapter
        loading = self.loading.get(weights.name) if weights else None
        if weights and loading and succeeded(loading) and self.paths[weights.name] == weights.path:
            return resolved
        later = (one for one in self._loaded_policies() if one.live == resolved.live and one.version > resolved.version)
        return max(later, key=lambda policy: policy.version, default=None)

    def _loaded_policies(self) -> list[Resolved]:
        names = (name for name in self.policies if name in self.loading and succeeded(self.loading[name]))
        return [self.policies[name] for name in names]

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
        for policy in self._loaded_policies():
            newest[policy.live] = max(policy.version, newest.get(policy.live, 0))
        for name, policy in list(self.policies.items()):
            is_old = policy.version < newest.get(policy.live, 0)
            if not self.held[name] and (is_old or policy.live == ended):
                del self.policies[name], self.held[name]
                if name in self.loading:
                    self.forget(name)
        if ended and not any(policy.live == ended for policy in self.policies.values()):
            self.turns.pop(ended, None)

    def forget(self, name: str) -> None:
        """Unload an adapter. Requests that run on it finish first; new ones load it again."""
        self.unloading[name] = asyncio.create_task(self._unload(name, self.loading.pop(name)))

    async def _unload(self, name: str, loading: asyncio.Task[None]) -> None:
        try:
            await loading
            await (await self.engine()).unload(name)
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
