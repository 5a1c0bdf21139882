"""Inference engines: which model is served by which processes, from first use until nobody needs them.

An engine serves one base model and adapters of it. The first request starts it, and others wait with it. It holds a
lease, ends when it was idle for long or another needs its device, and is started anew when its process died. A model
that may have several engines gets another one when all that it has are busy.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arbor_core.jobs.leases import LeaseEnd, LeaseHistory
from arbor_core.models.fine_tuned import FullPolicy, Resolved
from arbor_core.types import RETRY_SOON, Allocator, ApiError, ArborError, Engine

from .adapters import Newest
from .backends import Backends
from .hanging import kill_when_it_hangs
from .replicas import Conversations, next_number, started
from .served_model import Key, ServedModel
from .starting import EngineStarter, FailedStarts

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

LOAD_WAIT = 300.0
"""Seconds that a request waits for an engine to start."""
T = TypeVar("T")


class Engines:
    """The engines of one server.

    Args:
        backends: How the engines of each model are started.
        allocator: Who grants devices of the pool `engine`.
        root: Directory of the engines' scratch directories; emptied here.
        newest: Finds the newest policy of a job that learns or has learned from rollouts.
        threads: CPU threads of an engine.
        idle_seconds: An engine without requests for that long is stopped by `tick`.
        hang_seconds: An engine without a sign of life for that long is killed.
        load_wait: Seconds that a request waits for an engine to start.
        history: Is told of the engines' leases.
    """

    def __init__(
        self,
        backends: Backends,
        allocator: Allocator,
        root: Path,
        newest: Newest,
        *,
        threads: int,
        idle_seconds: float,
        hang_seconds: float,
        load_wait: float = LOAD_WAIT,
        history: LeaseHistory | None = None,
    ) -> None:
        self.backends, self.root, self.newest = backends, root, newest
        self.idle_seconds, self.hang_seconds, self.load_wait = idle_seconds, hang_seconds, load_wait
        self.models: dict[Key, ServedModel] = {}
        self.starter = EngineStarter(allocator, root, threads, history, self._end_idle, self._newest_full)
        self.failures = FailedStarts(root)
        self.conversations = Conversations()
        self.background: set[asyncio.Task[Any]] = set()
        self._session: aiohttp.ClientSession | None = None
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # engines' tokens are in there

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to all engines; opened at first use, because the import costs a tenth of a second."""
        if self._session is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                auto_decompress=False,
                read_bufsize=1 << 18,
            )
            if gc.get_freeze_count():  # as the server did when it started, whose process is its own
                gc.freeze()  # what was imported stays: looking through it again would hold up every request
        return self._session

    @asynccontextmanager
    async def using(self, resolved: Resolved) -> AsyncIterator[Engine]:
        """A running engine that serves a model, as `serving` yields it."""
        async with self.serving(resolved) as (engine, _):
            yield engine

    @asynccontextmanager
    async def serving(
        self, resolved: Resolved, conversation: Callable[[], bytes | None] = lambda: None
    ) -> AsyncIterator[tuple[Engine, Resolved]]:
        """A running engine that serves a model, and the model as it serves it. It is not stopped inside the block.

        A policy that is not loaded yet may be superseded before it is: what is yielded then is a newer one.

        Args:
            conversation: What requests of one conversation have in common, for models with several engines.

        Raises:
            ApiError: 404 `model_not_found`: there are no such weights;
                503 `engine_unavailable`: it cannot start, or the adapter cannot be loaded;
                503 `model_loading`: it takes longer than `load_wait`.
        """
        async with self.using_one(self._find(resolved, conversation), resolved) as found:
            yield found

    @asynccontextmanager
    async def using_one(self, model: ServedModel, resolved: Resolved) -> AsyncIterator[tuple[Engine, Resolved]]:
        """As `serving`, by one of the engines that serve the model."""
        model.users += 1
        try:
            with ExitStack() as held:
                held.enter_context(model.adapters.holding(resolved))
                try:
                    async with asyncio.timeout(self.load_wait):
                        engine = await asyncio.shield(model.start)
                        resolved = await self._load(model, engine, resolved, held)
                except TimeoutError:
                    message = f"The model '{resolved.name}' is still loading. Try again in a while."
                    raise ApiError(503, message, "model_loading", "model", {"retry-after": "10"}) from None
                yield engine, resolved
        finally:
            model.users -= 1
            model.used_at = time.monotonic()
            if model.users == 0:
                self.starter.released.set()

    async def _load(self, model: ServedModel, engine: Engine, resolved: Resolved, held: ExitStack) -> Resolved:
        """Load an adapter into an engine, or the newest weights; returns what is loaded."""
        if resolved.full:
            await self._update(model, engine, resolved, resolved.full)
        if resolved.adapter is None:
            return resolved
        try:
            return await model.adapters.ready(resolved, self.newest, held)
        except ApiError:
            await self.suspect(engine)  # one that died is forgotten before its client asks again
            raise

    async def _update(self, model: ServedModel, engine: Engine, resolved: Resolved, full: FullPolicy) -> None:
        """Have an engine's weights replaced by a policy of all weights, or a newer one."""
        if update := model.update(full, lambda: self._newest_full(model)):
            try:
                await asyncio.shield(update)
            except ArborError as error:  # its weights may be mixed: it never answers again
                log.warning("weights of %s: %s", resolved.name, error)
                await asyncio.shield(self.later(self._disown(model, engine)))
                message = f"The engine of '{resolved.name}' did not take new weights. It is started again."
                raise ApiError(503, message, "engine_unavailable", "model", RETRY_SOON) from None

    def _newest_full(self, model: ServedModel) -> FullPolicy | None:
        newest = self.newest(model.key.name)
        return newest.full if newest else None

    def replicas(self, resolved: Resolved) -> list[ServedModel]:
        """The engines that serve a model now, or are about to."""
        return [one for key, one in self.models.items() if key[:2] == (resolved.base, resolved.base_path)]

    def _find(self, resolved: Resolved, conversation: Callable[[], bytes | None]) -> ServedModel:
        """The engine for a request. Where there is none one is started; and another, where all are busy and there may
        be more: it serves later requests."""
        replicas = self.replicas(resolved)
        if not replicas:
            return self._open(resolved, [])
        if started(replicas)[0].needs.replicas == 1:
            return replicas[0]
        chosen = self.conversations.choose((resolved.base, resolved.base_path), conversation(), replicas)
        busy = all(one.users for one in replicas) and not self.failures.stays_alone(resolved.base, resolved.base_path)
        if busy and len(replicas) < chosen.needs.replicas:
            self._open(resolved, replicas)
        return chosen

    def recover(self, resolved: Resolved) -> None:
        """Let engines of a model be started although they failed just before."""
        self.failures.forget(resolved.base, resolved.base_path)

    def _open(self, resolved: Resolved, others: list[ServedModel]) -> ServedModel:
        """Begin to start an engine."""
        key = Key(resolved.base, resolved.base_path, next_number(others))
        if not others:
            self.failures.check(key)
        try:
            devices = self.starter.allocator.inventory().get("engine", ())
            needs = self.backends.needs(resolved.family, key.path, devices)
        except ArborError as error:
            log.warning("engine of %s: %s", key.name, error)
            raise self.failures.refusal(key, error) from None
        backend = self.backends.of(resolved.family)
        model = ServedModel(
            key, backend, needs, lambda one: asyncio.create_task(self._start(one)), resolved.full, bool(others)
        )
        self.models[key] = model
        return model

    async def _start(self, model: ServedModel) -> Engine:
        """Start an engine. A failure reaches every request that waits."""
        try:
            engine = await self.starter.start(model)
        except BaseException as error:
            self._drop(model)
            if isinstance(error, ArborError | OSError):
                log.warning("engine of %s: %s", model.key.name, error)
                raise self.failures.add(model, error) from None
            raise
        self.failures.started(model.key)
        model.ending = "died"  # if nobody ends it before
        model.watch = asyncio.create_task(self._watch(model, engine))
        return engine

    async def _end_idle(self) -> None:
        """Stop the engine that nobody has used for longest."""
        idle = [one for one in self.models.values() if one.idle]
        if idle:
            await self.stop(min(idle, key=lambda one: one.used_at), "made_room")

    def later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something to its end, whoever stops waiting for it."""
        self.background.add(task := asyncio.create_task(work))
        task.add_done_callback(self.background.discard)
        return task

    async def _watch(self, model: ServedModel, engine: Engine) -> None:
        """Forget an engine whose process ended, and kill one that hangs: the next request starts another."""
        check = asyncio.create_task(kill_when_it_hangs(model.key.name, engine, self.hang_seconds))
        try:
            how = await engine.wait()
        finally:
            check.cancel()
        log.warning("engine of %s ended: %s", model.key.name, how)
        self._drop(model)

    def _drop(self, model: ServedModel) -> None:
        """Forget a model's engine, and release its devices."""
        if self.models.get(model.key) is model:
            del self.models[model.key]
        self.starter.release(model)

    async def _disown(self, model: ServedModel, engine: Engine) -> None:
        """End an engine that must not answer again."""
        model.ending = "killed"
        await engine.kill()
        await self.stop(model, "killed")

    async def stop(self, model: ServedModel, reason: LeaseEnd) -> None:
        """End an engine. New requests start another, which waits for the device."""
        model.ending = reason
        if self.models.get(model.key) is model:
            del self.models[model.key]
        if model.watch:
            model.watch.cancel()
        model.start.cancel()
        outcome = (await asyncio.gather(model.start, return_exceptions=True))[0]
        if not isinstance(outcome, BaseException):
            await outcome.stop()
            shutil.rmtree(model.dir or "", ignore_errors=True)  # one that failed keeps its log
        self._drop(model)

    async def suspect(self, engine: Engine) -> bool:
        """Whether an engine that broke a connection is lost; it is ended then, and the next request starts another.

        A process that dies is noticed by itself, but a little after its connections break.
        """
        return await asyncio.shield(self.later(self._suspect(engine)))

    async def _suspect(self, engine: Engine) -> bool:
        model = next((s for s in self.models.values() if s.engine is engine), None)
        if model is None:
            return True
        if await engine.health():
            return False
        log.warning("engine of %s does not answer and is killed", model.key.name)
        await self._disown(model, engine)
        return True

    async def forget(self, name: str) -> None:
        """Unload a model that was deleted, wherever it is loaded; requests on it finish first."""
        for model in list(self.models.values()):
            if name in model.adapters:
                model.adapters.forget(name)
            elif model.key.name == name and model.idle:
                await self.stop(model, "deleted")

    async def tick(self) -> None:
        """Stop engines that nobody has used for `idle_seconds`. To be called every few seconds."""
        before = time.monotonic() - self.idle_seconds
        for model in [one for one in self.models.values() if one.idle and one.used_at < before]:
            log.info("engine of %s is idle and stops", model.key.name)
            await self.stop(model, "idle")

    async def close(self) -> None:
        """Stop every engine."""
        for task in list(self.background):
            task.cancel()
        await asyncio.gather(
            *(self.stop(model, "server_ended") for model in list(self.models.values())), return_exceptions=True
        )
        if self._session is not None:
            await self._session.close()
