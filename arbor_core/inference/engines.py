"""Inference engines: which model is served by which process, from first use until nobody needs it.

An engine serves one base model and any number of adapters of it. It is started by the first request, which others may
join in waiting; it holds a lease, ends when it was idle for long or another needs its device, and is started anew by
the next request when its process has died.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp

from arbor_core.models.fine_tuned import Resolved
from arbor_core.types import (
    NO_RETRY,
    RETRY_SOON,
    Allocator,
    ApiError,
    ArborError,
    Bundle,
    Claim,
    Engine,
    EngineSpec,
    InferenceBackend,
    Lease,
    UnknownModelError,
)

from .redaction import without_paths
from .served_model import Key, Served, heard, kill_when_it_hangs

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

LOAD_WAIT = 300.0
"""Seconds that a request waits for an engine to start."""
FAILURE_SECONDS = 30.0
"""A model that could not be served is not tried again for so long: a client that insists would start a process with
each request."""
LOOK_SECONDS = 0.5
"""How often a start that waits for a device looks for an idle engine."""
T = TypeVar("T")


class Engines:
    """The engines of one server.

    Args:
        backend: How an engine is started.
        allocator: Who grants devices of the pool `engine`.
        root: Directory of the engines' scratch directories; emptied here.
        options: The backend's options.
        threads: CPU threads of an engine.
        idle_seconds: An engine that nobody has used for so long is stopped by `tick`.
        hang_seconds: An engine that shows no sign of life for so long is killed.
        load_wait: Seconds that a request waits for an engine to start.
    """

    def __init__(
        self,
        backend: InferenceBackend,
        allocator: Allocator,
        root: Path,
        *,
        options: Mapping[str, Any],
        threads: int,
        idle_seconds: float,
        hang_seconds: float,
        load_wait: float = LOAD_WAIT,
    ) -> None:
        self.backend, self.allocator, self.root = backend, allocator, root
        self.options, self.threads = dict(options), threads
        self.idle_seconds, self.hang_seconds, self.load_wait = idle_seconds, hang_seconds, load_wait
        self.served: dict[Key, Served] = {}
        self.failed: dict[Key, tuple[float, Exception]] = {}
        """Until when a start is not tried again, and why."""
        self.started, self.freed = 0, asyncio.Event()
        self.background: set[asyncio.Task[Any]] = set()
        self._session: aiohttp.ClientSession | None = None
        shutil.rmtree(root, ignore_errors=True)

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to all engines; made at first use, because the import costs a tenth of a second."""
        if self._session is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                auto_decompress=False,
                read_bufsize=1 << 18,
            )
            gc.freeze()  # what was imported stays: looking through it again would hold up every request
        return self._session

    @asynccontextmanager
    async def using(self, resolved: Resolved) -> AsyncIterator[Engine]:
        """The running engine that serves a model, its adapter loaded; it is not stopped inside the block.

        Raises:
            ApiError: 404 `model_not_found`: there are no such weights;
                503 `engine_unavailable`: it cannot start, or the adapter cannot be loaded;
                503 `model_loading`: it takes longer than `load_wait`.
        """
        served = self._find(resolved)
        served.users += 1
        try:
            with served.holding(resolved):
                try:
                    async with asyncio.timeout(self.load_wait):
                        engine = await asyncio.shield(served.start)
                        await self._load(served, engine, resolved)
                except TimeoutError:
                    message = f"The model '{resolved.name}' is still loading. Try again in a while."
                    raise ApiError(503, message, "model_loading", "model", {"retry-after": "10"}) from None
                yield engine
        finally:
            served.users -= 1
            served.used_at = time.monotonic()
            if served.users == 0:
                self.freed.set()

    async def _load(self, served: Served, engine: Engine, resolved: Resolved) -> None:
        """Have an engine know an adapter, or have the newest weights."""
        if resolved.adapter:
            try:
                await asyncio.shield(served.adapter(resolved.adapter))
            except ApiError:
                await self.suspect(engine)  # one that died is forgotten before its client asks again
                raise
            served.retire()
        if resolved.full and (update := served.update(resolved.full)):
            try:
                await asyncio.shield(update)
            except ArborError as error:  # its weights may be mixed: it never answers again
                log.warning("weights of %s: %s", resolved.name, error)
                await asyncio.shield(self.later(self._disown(served, engine)))
                message = f"The engine of '{resolved.name}' did not take new weights. It is started again."
                raise ApiError(503, message, "engine_unavailable", "model", RETRY_SOON) from None

    def _find(self, resolved: Resolved) -> Served:
        """What serves the base, or a start of it that has begun now."""
        key = (resolved.base, resolved.base_path)
        if served := self.served.get(key):
            return served
        self.failed = {key: entry for key, entry in self.failed.items() if time.monotonic() < entry[0]}
        if key in self.failed:
            raise self._refusal(key, self.failed[key][1])
        served = Served(key, asyncio.create_task(self._start(key)), full=resolved.full)
        served.start.add_done_callback(heard)
        self.served[key] = served
        return served

    async def _start(self, key: Key) -> Engine:
        """Lease a device and start an engine on it; whoever waits for it hears why it failed."""
        served = self.served[key]
        path = served.full.path if served.full else key[1]
        try:
            await self.backend.find(path)
            served.lease = await self._lease(key)
            self.started += 1
            served.dir = self.root / str(self.started)
            spec = EngineSpec(
                model=key[0],
                path=path,
                dir=served.dir,
                devices=served.lease.of("engine"),
                threads=self.threads,
                token=secrets.token_urlsafe(24),
                options=self.options,
                version=served.full.version if served.full else None,
            )
            engine = await self.backend.start(spec)
        except BaseException as error:
            self._drop(served)
            if isinstance(error, ArborError | OSError):
                log.warning("engine of %s: %s", key[0], error)
                if served.outrun(path):  # the next request finds newer ones
                    raise ApiError(
                        503, f"'{key[0]}' is loaded anew.", "engine_unavailable", "model", RETRY_SOON
                    ) from None
                self.failed[key] = (time.monotonic() + FAILURE_SECONDS, error)
                raise self._refusal(key, error) from None
            raise
        served.watch = asyncio.create_task(self._watch(served, engine))
        return engine

    def _refusal(self, key: Key, error: Exception) -> ApiError:
        """What a client hears of a start that failed. The log has it with all paths."""
        name, reason = key[0], without_paths(str(error), key[1], str(self.root))
        if isinstance(error, UnknownModelError):
            return ApiError(404, f"The model '{name}' does not exist: {reason}", "model_not_found", "model")
        return ApiError(503, f"The model '{name}' cannot be served: {reason}", "engine_unavailable", None, NO_RETRY)

    async def _lease(self, key: Key) -> Lease:
        """A device for an engine; idle engines make room, the one not used for longest first.

        Raises:
            ArborError: this machine has no device to serve from.
        """
        waiting = asyncio.ensure_future(self.allocator.acquire(Claim(f"engine:{key[0]}", (Bundle("engine"),))))
        try:
            await asyncio.wait({waiting}, timeout=0)
            while not waiting.done():
                self.freed.clear()
                idle = min((s for s in self.served.values() if s.idle), key=lambda s: s.used_at, default=None)
                if idle and not self.allocator.free().get("engine"):
                    await self.stop(idle)
                freed = asyncio.ensure_future(self.freed.wait())
                await asyncio.wait({waiting, freed}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                freed.cancel()
            return await waiting
        except asyncio.CancelledError:
            if not waiting.cancel() and not waiting.cancelled() and not waiting.exception():
                self.allocator.release(waiting.result())
            raise

    def later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something to its end, whoever stops waiting for it."""
        self.background.add(task := asyncio.create_task(work))
        task.add_done_callback(self.background.discard)
        return task

    async def _watch(self, served: Served, engine: Engine) -> None:
        """Notice that the process has ended, and end it when it hangs: the next request starts another."""
        pulse = asyncio.create_task(kill_when_it_hangs(served.key[0], engine, self.hang_seconds))
        try:
            how = await engine.wait()
        finally:
            pulse.cancel()
        log.warning("engine of %s ended: %s", served.key[0], how)
        self._drop(served)

    def _drop(self, served: Served) -> None:
        """Forget what served, and give its devices back."""
        if self.served.get(served.key) is served:
            del self.served[served.key]
        if served.lease:
            self.allocator.release(served.lease)
            served.lease = None
        self.freed.set()

    async def _disown(self, served: Served, engine: Engine) -> None:
        """End an engine that must not answer again."""
        await engine.kill()
        await self.stop(served)

    async def stop(self, served: Served) -> None:
        """End an engine. New requests start another, which waits for the device."""
        if self.served.get(served.key) is served:
            del self.served[served.key]
        if served.watch:
            served.watch.cancel()
        served.start.cancel()
        outcome = (await asyncio.gather(served.start, return_exceptions=True))[0]
        if not isinstance(outcome, BaseException):
            await outcome.stop()
            shutil.rmtree(served.dir or "", ignore_errors=True)  # one that failed keeps its log
        self._drop(served)

    async def suspect(self, engine: Engine) -> bool:
        """Whether an engine that broke a connection is lost; it is ended then, and the next request starts another.

        A process that dies is noticed by itself, but a little after its connections break.
        """
        return await asyncio.shield(self.later(self._suspect(engine)))

    async def _suspect(self, engine: Engine) -> bool:
        served = next((s for s in self.served.values() if s.engine is engine), None)
        if served is None:
            return True
        if await engine.health():
            return False
        log.warning("engine of %s does not answer and is killed", served.key[0])
        await self._disown(served, engine)
        return True

    async def forget(self, name: str) -> None:
        """Unload a model that was deleted, wherever it is loaded; requests on it finish first."""
        for served in list(self.served.values()):
            if name in served.adapters:
                served.forget(name)
            elif served.key[0] == name and served.idle:
                await self.stop(served)

    async def tick(self) -> None:
        """Stop engines that nobody has used for `idle_seconds`. To be called every few seconds."""
        before = time.monotonic() - self.idle_seconds
        for served in [one for one in self.served.values() if one.idle and one.used_at < before]:
            log.info("engine of %s is idle and stops", served.key[0])
            await self.stop(served)

    async def close(self) -> None:
        """Stop every engine."""
        for task in list(self.background):
            task.cancel()
        await asyncio.gather(*(self.stop(served) for served in list(self.served.values())), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
