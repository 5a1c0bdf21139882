"""The composition root: all parts of a server, wired once, from its settings. Works without HTTP, in any thread."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from arbor_core.commands.open_sessions import OpenSessions as CommandSessions
from arbor_core.config.settings import ServeConfig
from arbor_core.dispatch.attempts import Attempts
from arbor_core.dispatch.dispatcher import Dispatcher
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.monitor import Monitor
from arbor_core.dispatch.observers import Observers
from arbor_core.dispatch.outcome import Outcomes
from arbor_core.dispatch.validation import Validation
from arbor_core.files.repository import Files
from arbor_core.files.uploads import Uploads
from arbor_core.inference.adapters import Newest
from arbor_core.inference.backends import Backends
from arbor_core.inference.engines import Engines
from arbor_core.inference.process import end_engines
from arbor_core.inference.weight_sync import WeightSync
from arbor_core.jobs.leases import LeaseHistory
from arbor_core.jobs.repository import Jobs
from arbor_core.models.catalog import Models
from arbor_core.plugins import Plugins, load
from arbor_core.rollouts.session import OpenSessions
from arbor_core.storage.database import Store
from arbor_core.storage.directory import locked, make_private
from arbor_core.types import (
    TERMINAL,
    Allocator,
    ArborError,
    Executor,
)

from .choice import Chosen, check_paths, choose
from .completions import CompletionService
from .file_service import FileService
from .job_service import JobService
from .model_service import ModelService
from .opening import bring_up_to_date, keep_executor
from .servable import ServableCheck
from .status import ServerStatus
from .submission import Submission, TrainerDefaults
from .upload_service import UploadService

log = logging.getLogger(__name__)
TICK_SECONDS = 5.0


@dataclass
class Arbor:
    """A server's parts, as `open_system` puts them together."""

    settings: ServeConfig
    plugins: Plugins
    trainers: Mapping[str, TrainerDefaults]
    default_trainer: str | None
    store: Store
    jobs: Jobs
    job_service: JobService
    files: Files
    file_service: FileService
    uploads: Uploads
    upload_service: UploadService
    models: Models
    model_service: ModelService
    completion_service: CompletionService
    status: ServerStatus
    sessions: OpenSessions
    command_sessions: CommandSessions
    allocator: Allocator
    executor: Executor
    engines: Engines
    weight_sync: WeightSync
    observers: Observers
    dispatcher: Dispatcher
    lock: IO[str]
    """Held while this server works on the storage directory."""
    failure: BaseException | None = None
    """Why it cannot go on."""
    begun: bool = False

    @asynccontextmanager
    async def running(self, on_failure: Callable[[BaseException], object] | None = None) -> AsyncIterator[Arbor]:
        """Dispatch jobs and look after engines; on the way out engines end, trainers go on, and all that this server
        holds is given back. Once for each server.

        Args:
            on_failure: Called with the reason when the server cannot go on. It would look alive and do nothing, so
                leave the block soon. None: what runs inside the block is cancelled.

        Raises:
            ArborError: it could not go on, and nobody was called.
        """
        if self.begun:
            raise ArborError("this server has run already: open another one with open_system(settings)")
        self.begun, tasks = True, list[asyncio.Task[None]]()
        owner = asyncio.current_task()

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and self.failure is None and (error := task.exception()):
                log.critical("the server cannot go on; running jobs go on without it", exc_info=error)
                self.failure = error
                if on_failure:
                    on_failure(error)
                elif owner:
                    owner.cancel()

        try:
            try:
                await self._begin()
                tasks += [asyncio.create_task(self.dispatcher.run()), asyncio.create_task(self._tick())]
                for task in tasks:
                    task.add_done_callback(ended)
                yield self
            finally:
                await to_its_end(self._end(tasks))
        except asyncio.CancelledError:
            if self.failure is None or on_failure or (owner and owner.uncancel()):  # somebody else wants it to end
                raise
        if self.failure and not on_failure:
            raise ArborError(f"the server could not go on: {self.failure}") from self.failure

    async def _begin(self) -> None:
        if self.default_trainer:
            chosen = self.trainers[self.default_trainer].trainer
            self.executor.prepare(chosen.python, chosen.preload, chosen.prove)
        await asyncio.to_thread(self.sessions.recover)

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.engines.close()
        await self.executor.close()
        self.close()

    def close(self) -> None:
        """Give back what this server holds. `running()` does it; to be called for one that never runs."""
        self.begun = True
        self.observers.close()
        self.sessions.close()
        self.command_sessions.close()
        self.store.close()
        self.lock.close()

    async def _tick(self) -> None:
        works = (self.engines.tick, self._close_ended_sessions, self.weight_sync.tick, self.uploads.expire)
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for work in works:
                try:
                    await work()
                except Exception:  # a full disk, say: the others go on, and the next tick tries again
                    log.exception("%s failed", work.__qualname__)

    async def _close_ended_sessions(self) -> None:
        """Close the sessions of jobs that have ended, which no request may name again."""
        for job_id in list(self.sessions.by_job):
            if (job := self.jobs.get(job_id)) and job.status in TERMINAL:
                self.sessions.end(job_id)
        self.command_sessions.close_ended()


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Do something whole, even where the caller is cancelled meanwhile, which then takes effect afterwards."""
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled:
        raise cancelled


def open_system(settings: ServeConfig, plugins: Plugins | None = None, default_trainer: str | None = None) -> Arbor:
    """Put a server together, without HTTP:

        async with open_system(serve_settings("storage=DIR")).running() as arbor:
            ...

    It holds the storage directory until that block ends, and leaves nothing behind in this process. It may be opened in
    any thread, with or without a running event loop, whatever else the process does.

    Args:
        plugins: Default: all that are installed, without those that the settings disable.
        default_trainer: Name of the trainer that jobs get whose request names no method; default: that of the settings.

    Raises:
        ArborError: a name that no plugin brings, a device that is not there, a storage directory that cannot be used or
            that another server has. Nothing is held then.
    """
    check_paths(settings)
    plugins = plugins or load(settings.plugins.disabled)
    chosen = choose(settings, plugins, default_trainer or settings.default_trainer)  # before anything is touched
    root = settings.storage.absolute()
    with ExitStack() as undo:  # what is taken here, unless all goes well
        lock = undo.enter_context(locked(root))
        make_private(root)
        store = Store(root / "arbor.db")
        undo.callback(store.close)
        observers = Observers(plugins)
        undo.callback(observers.close)
        arbor = wired(settings, plugins, store, observers, chosen, lock)
        undo.pop_all()
    return arbor


def wired(
    settings: ServeConfig, plugins: Plugins, store: Store, observers: Observers, chosen: Chosen, lock: IO[str]
) -> Arbor:
    """The parts of a server that holds its storage directory and has opened its database."""
    root, allocator, executor, trainers = store.path.parent, chosen.allocator, chosen.executor, chosen.trainers
    jobs, files = Jobs(store), Files(store, root / "files", settings.limits)
    models = Models(store, settings.models, root)
    identity = bring_up_to_date(store, models)
    keep_executor(store, settings.executor)
    history = LeaseHistory(store)
    folder, newest = root / "engines", models.jobs.last
    engines = open_engines(settings, chosen.backends, allocator, folder, newest, history)
    weight_sync = WeightSync(models.jobs, engines, jobs)
    command_sessions = CommandSessions(root, jobs.get)
    dispatcher = open_dispatcher(
        settings, chosen, jobs, files, models, observers, identity, weight_sync, command_sessions
    )
    submission = Submission(
        plugins,
        trainers,
        chosen.default_trainer,
        jobs,
        files,
        models,
        allocator,
        settings.limits,
        ServableCheck(chosen.backends),
    )
    uploads, sessions = Uploads(files), OpenSessions(store, root)
    return Arbor(
        settings=settings,
        plugins=plugins,
        trainers=trainers,
        default_trainer=chosen.default_trainer,
        store=store,
        jobs=jobs,
        job_service=JobService(store, jobs, submission, dispatcher, settings.organization),
        files=files,
        file_service=FileService(files),
        uploads=uploads,
        upload_service=UploadService(uploads),
        models=models,
        model_service=ModelService(models, engines, settings.organization),
        completion_service=CompletionService(models, jobs, sessions, engines),
        status=ServerStatus(plugins, trainers, allocator),
        sessions=sessions,
        command_sessions=command_sessions,
        allocator=allocator,
        executor=executor,
        engines=engines,
        weight_sync=weight_sync,
        observers=observers,
        dispatcher=dispatcher,
        lock=lock,
    )


def open_dispatcher(
    settings: ServeConfig,
    chosen: Chosen,
    jobs: Jobs,
    files: Files,
    models: Models,
    observers: Observers,
    identity: str,
    weight_sync: WeightSync,
    command_sessions: CommandSessions,
) -> Dispatcher:
    """The dispatcher of a server and its parts."""
    root, allocator, executor, limits = models.root, chosen.allocator, chosen.executor, settings.limits
    threads = threads_per_device(settings, allocator)
    attempts = Attempts(
        jobs, files, models, executor, chosen.launcher, identity, settings, threads, chosen.backends.sender
    )
    ingest = Ingest(jobs, observers, root, settings.organization, weight_sync.published)
    outcomes = Outcomes(jobs, files, ingest, executor, root, limits, allocator.set_aside)
    by_name = {name: entry.trainer for name, entry in chosen.trainers.items()}
    return Dispatcher(
        jobs,
        attempts,
        Validation(jobs, files, attempts, executor, by_name, ServableCheck(chosen.backends)),
        Monitor(attempts, ingest, outcomes, executor, limits),
        by_name,
        chosen.scheduler,
        allocator,
        root / "run" / "bell",
        limits.room_seconds,
        command_sessions.wake,
    )


def open_engines(
    settings: ServeConfig,
    backends: Backends,
    allocator: Allocator,
    folder: Path,
    newest: Newest,
    history: LeaseHistory,
) -> Engines:
    """The engines of a server; those that an earlier one left in the folder are ended."""
    end_engines(folder)
    return Engines(
        backends,
        allocator,
        folder,
        newest,
        threads=settings.threads or os.cpu_count() or 1,
        idle_seconds=settings.limits.engine_idle_seconds,
        hang_seconds=settings.limits.engine_heartbeat_seconds,
        history=history,
    )


def threads_per_device(settings: ServeConfig, allocator: Allocator) -> int:
    """CPU threads of a training process: those of the settings, or the cores, divided among the devices that train."""
    slots = max(1, len(allocator.inventory().get("train", ())))
    return settings.threads or max(1, (os.cpu_count() or 1) // slots)
