"""The composition root: all parts of a server, wired once, from its settings. Works without HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from arbor_core.config import compose, convert
from arbor_core.config.settings import ServeConfig
from arbor_core.crash_points import crash_point
from arbor_core.dispatch.attempts import Attempts
from arbor_core.dispatch.dispatcher import Dispatcher
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.monitor import Monitor
from arbor_core.dispatch.observers import Observers
from arbor_core.dispatch.outcome import Outcomes
from arbor_core.dispatch.validation import Validation
from arbor_core.files.repository import Files
from arbor_core.files.uploads import Uploads
from arbor_core.inference.engines import Engines
from arbor_core.inference.process import end_engines
from arbor_core.inference.weight_sync import WeightSync
from arbor_core.jobdir.documents import upgrade
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.repository import Jobs
from arbor_core.models.catalog import Models
from arbor_core.models.fine_tuned import Resolved
from arbor_core.plugins import Plugins
from arbor_core.rollouts.session import OpenSessions
from arbor_core.storage.database import Store
from arbor_core.storage.directory import locked, make_private
from arbor_core.types import (
    PROTOCOL,
    Allocator,
    AllocatorSettings,
    ArborError,
    Executor,
    ExecutorSettings,
    InferenceBackend,
)
from arbor_core.worker.launchers import ConfiguredLauncher, accelerate

from .job_service import JobService
from .submission import Submission, TrainerDefaults

log = logging.getLogger(__name__)
TICK_SECONDS = 5.0


@dataclass
class Arbor:
    """A server's parts."""

    settings: ServeConfig
    plugins: Plugins
    trainers: Mapping[str, TrainerDefaults]
    default_trainer: str | None
    store: Store
    jobs: Jobs
    job_service: JobService
    files: Files
    uploads: Uploads
    models: Models
    sessions: OpenSessions
    allocator: Allocator
    executor: Executor
    engines: Engines
    weight_sync: WeightSync
    observers: Observers
    dispatcher: Dispatcher
    lock: IO[str]
    """Held while this server works on the storage directory."""
    failed: bool = False
    """It had to end by itself."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Dispatch jobs and look after engines; on the way out engines end and trainers go on."""
        if self.default_trainer:
            chosen = self.trainers[self.default_trainer].trainer
            self.executor.prepare(chosen.python, chosen.preload, chosen.prove)
        await asyncio.to_thread(self.sessions.recover)
        tasks = [asyncio.create_task(self.dispatcher.run()), asyncio.create_task(self._tick())]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.engines.close()
            await self.executor.close()
            self.observers.close()
            self.sessions.close()
            self.store.close()
            self.lock.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End the server when one of its tasks has ended: it would look alive and do nothing."""
        if not task.cancelled() and (error := task.exception()):
            log.critical("the server cannot go on and ends; running jobs go on without it", exc_info=error)
            self.failed = True
            os.kill(os.getpid(), signal.SIGTERM)

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
            if job := self.jobs.get(job_id):
                self.sessions.of(job)


def open_system(settings: ServeConfig, plugins: Plugins, default_trainer: str | None) -> Arbor:
    """Wire a server together.

    Raises:
        ArborError: a name that no plugin brings, a device that is not there, a storage directory that cannot be used.
    """
    root = settings.storage.absolute()
    trainers = trainer_defaults(settings, plugins, default_trainer)
    scheduler = plugins.get("schedulers", settings.scheduler)()
    allocator = plugins.get("allocators", settings.allocator)(
        AllocatorSettings(settings.gpu.train_ids, settings.gpu.inference_ids, settings.limits.engines)
    )
    executor = plugins.get("executors", settings.executor)(ExecutorSettings(settings.start, root / "run"))
    launcher = launcher_of(settings, plugins)
    backend = plugins.get("inference_backends", settings.inference)()
    options = engine_options(settings, backend)  # before anything is touched
    lock = locked(root)
    make_private(root)
    store = Store(root / "arbor.db")
    jobs, files = Jobs(store), Files(store, root / "files", settings.limits)
    models = Models(store, settings.models, root)
    identity = bring_up_to_date(store, models)
    keep_executor(store, settings.executor)
    observers = Observers(plugins)
    engines = open_engines(settings, backend, options, allocator, root / "engines", models.jobs.last)
    weight_sync = WeightSync(models.jobs, engines, jobs)
    threads = threads_per_device(settings, allocator)
    attempts = Attempts(jobs, files, models, executor, launcher, identity, settings, threads)
    ingest = Ingest(jobs, observers, root, settings.organization, weight_sync.published)
    outcomes = Outcomes(jobs, files, ingest, executor, root, settings.limits, allocator.set_aside)
    by_name = {name: entry.trainer for name, entry in trainers.items()}
    dispatcher = Dispatcher(
        jobs,
        attempts,
        Validation(jobs, files, attempts, executor, by_name),
        Monitor(attempts, ingest, outcomes, executor, settings.limits),
        by_name,
        scheduler,
        allocator,
        root / "run" / "bell",
        settings.limits.room_seconds,
    )
    submission = Submission(plugins, trainers, default_trainer, jobs, files, models, allocator, settings.limits)
    return Arbor(
        settings=settings,
        plugins=plugins,
        trainers=trainers,
        default_trainer=default_trainer,
        store=store,
        jobs=jobs,
        job_service=JobService(store, jobs, submission, dispatcher, settings.organization),
        files=files,
        uploads=Uploads(files),
        models=models,
        sessions=OpenSessions(store, root),
        allocator=allocator,
        executor=executor,
        engines=engines,
        weight_sync=weight_sync,
        observers=observers,
        dispatcher=dispatcher,
        lock=lock,
    )


def open_engines(
    settings: ServeConfig,
    backend: InferenceBackend,
    options: Mapping[str, Any],
    allocator: Allocator,
    folder: Path,
    newest: Callable[[str], Resolved | None],
) -> Engines:
    """The engines of a server; those that an earlier one left in the folder are ended."""
    end_engines(folder)
    return Engines(
        backend,
        allocator,
        folder,
        newest,
        options=options,
        threads=settings.threads or os.cpu_count() or 1,
        idle_seconds=settings.limits.engine_idle_seconds,
        hang_seconds=settings.limits.engine_heartbeat_seconds,
    )


def engine_options(settings: ServeConfig, backend: InferenceBackend) -> dict[str, Any]:
    """The options of the inference backend: its YAML, and the server's settings over it.

    Raises:
        ConfigError: one that the backend does not take.
    """
    options = convert.merged(compose.defaults("backend", settings.inference), settings.engine)
    convert.typed(options, backend.options, where="engine")
    return options


def launcher_of(settings: ServeConfig, plugins: Plugins) -> ConfiguredLauncher:
    """Who starts the ranks of a job with several devices.

    Raises:
        ArborError: no plugin brings it, or an option is not one of its own.
    """
    chosen = ConfiguredLauncher.of(plugins, settings.launcher)
    if settings.accelerate_config is None:
        return chosen
    log.warning(
        "accelerate_config: accelerate starts the ranks of jobs, and not launcher=%s; the key will become options of "
        "launcher=accelerate",
        settings.launcher["name"],
    )
    return accelerate(settings.accelerate_config)


def threads_per_device(settings: ServeConfig, allocator: Allocator) -> int:
    """CPU threads of a training process: those of the settings, or the cores, divided among the devices that train."""
    slots = max(1, len(allocator.inventory().get("train", ())))
    return settings.threads or max(1, (os.cpu_count() or 1) // slots)


def keep_executor(store: Store, name: str) -> None:
    """Note under which executor jobs run. Another one cannot find their attempts: it would take them for lost, and
    start them a second time while they live.

    Raises:
        ArborError: jobs run under another executor.
    """
    noted = store.one("SELECT value FROM storage WHERE key='executor'")
    if noted is None or noted["value"] != name:
        running = [row["id"] for row in store.read("SELECT id FROM jobs WHERE status='running' ORDER BY seq")]
        if noted and running:
            raise ArborError(
                f"{len(running)} job(s) run with executor={noted['value']}, which executor={name} cannot find "
                f"({running[0]}, say): start the server with executor={noted['value']} and pause or cancel them first"
            )
        store.write_now("INSERT OR REPLACE INTO storage(key,value) VALUES('executor',?)", name)


def bring_up_to_date(store: Store, models: Models) -> str:
    """Bring the job directories of earlier versions up to date; returns the identity of the storage directory.

    Who died here does it again: each job says by itself whether it is done, and the database when all are.
    """
    kept: dict[str, str] = {row["key"]: row["value"] for row in store.read("SELECT key, value FROM storage")}
    if kept.get("protocol") != str(PROTOCOL):
        for row in store.read("SELECT id, json_extract(spec,'$.trainer') AS trainer FROM jobs"):
            upgrade(JobDir.of(models.root, row["id"]), kept["id"], row["trainer"], models.locate)
            crash_point("job.upgraded")
        store.write_now("INSERT OR REPLACE INTO storage(key,value) VALUES('protocol',?)", str(PROTOCOL))
    return kept["id"]


def trainer_defaults(
    settings: ServeConfig, plugins: Plugins, default_trainer: str | None
) -> dict[str, TrainerDefaults]:
    """Every installed trainer with its YAML, and the command line's settings over it; all of it type-checked.

    Raises:
        ConfigError: a value that the trainer's struct does not take.
    """
    found = {}
    for name, trainer in plugins.all("trainers").items():
        values = compose.defaults("trainer", name)
        where = f"trainers.{name}"
        if name == default_trainer and settings.trainer:
            values, where = settings.trainer, "trainer"
        values, warnings = convert.renamed(values, trainer.config, where)
        more, further = convert.renamed(settings.trainers.get(name, {}), trainer.config, f"trainers.{name}")
        for warning in dict.fromkeys([*warnings, *further]):
            log.warning("configuration of the trainer %s: %s", name, warning)
        values = convert.merged(values, more)
        convert.typed(values, trainer.config, where=where)
        found[name] = TrainerDefaults(trainer, values)
    for name in settings.trainers:
        plugins.get("trainers", name)  # says which name is near
    return found
