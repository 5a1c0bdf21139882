"""The composition root: everything a server consists of, wired once, from its configuration."""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import config, convert
from .attempts import Attempts
from .config import ServeConfig
from .dispatcher import Dispatcher
from .engines import Engines
from .files import Files
from .jobs import Jobs
from .leftovers import end_engines
from .live import LiveJobs
from .live_weights import LiveWeights
from .models import Models
from .onlookers import Onlookers
from .plugins import Plugins
from .store import Store
from .types import Allocator, AllocatorSettings, ArborError, Executor, ExecutorSettings, Trainer
from .uploads import Uploads

log = logging.getLogger(__name__)
TICK_SECONDS = 5.0
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs")


@dataclass(frozen=True)
class TrainerDefaults:
    """A trainer and what its configuration is before a client says anything."""

    trainer: Trainer
    values: Mapping[str, Any]


@dataclass
class Arbor:
    """A server's parts."""

    settings: ServeConfig
    plugins: Plugins
    trainers: Mapping[str, TrainerDefaults]
    default_trainer: str | None
    store: Store
    jobs: Jobs
    files: Files
    uploads: Uploads
    models: Models
    engines: Engines
    allocator: Allocator
    executor: Executor
    onlookers: Onlookers
    dispatcher: Dispatcher
    live: LiveJobs
    live_weights: LiveWeights
    lock: IO[str]
    failed: bool = False
    """It had to end by itself."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Dispatch jobs and look after engines; on the way out engines end and trainers go on."""
        if self.default_trainer:
            chosen = self.trainers[self.default_trainer].trainer
            self.executor.prepare(chosen.python, chosen.preload, chosen.prove)
        await asyncio.to_thread(self.live.settle)
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
            self.onlookers.close()
            self.live.close()
            self.store.close()
            self.lock.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End the server when what it lives for has ended: one that only looks alive would be left so."""
        if not task.cancelled() and (error := task.exception()):
            log.critical("the server cannot go on and ends; running jobs go on without it", exc_info=error)
            self.failed = True
            os.kill(os.getpid(), signal.SIGTERM)

    async def _tick(self) -> None:
        works = (self.engines.tick, self._close_ended, self.live_weights.tick, self.uploads.expire)
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for work in works:
                try:
                    await work()
                except Exception:  # a full disk, say: the others go on, and the next tick tries again
                    log.exception("%s failed", work.__qualname__)

    async def _close_ended(self) -> None:
        """Close the rollouts of jobs that have ended, though nobody asks for them any more."""
        for job_id in list(self.live.open):
            if job := self.jobs.get(job_id):
                self.live.of(job)


def open_system(settings: ServeConfig, plugins: Plugins, default_trainer: str | None) -> Arbor:
    """Wire a server together.

    Raises:
        ArborError: a name that no plugin brings, a device that is not there, a storage directory that cannot be used.
    """
    trainers = trainer_defaults(settings, plugins, default_trainer)
    scheduler = plugins.get("schedulers", settings.scheduler)()
    allocator = plugins.get("allocators", settings.allocator)(
        AllocatorSettings(settings.gpu.train_ids, settings.gpu.inference_ids, settings.limits.engines)
    )
    backend = plugins.get("inference_backends", settings.inference)()
    root = settings.storage.absolute()
    executor = plugins.get("executors", settings.executor)(ExecutorSettings(settings.launcher, root / "run"))
    engine_options = config.merged(config.defaults("backend", settings.inference), settings.engine)
    convert.typed(engine_options, backend.options, where="engine")
    lock = locked(root)
    make_private(root)
    store = Store(root / "arbor.db")
    jobs, files = Jobs(store), Files(store, root / "files", settings.limits)
    models = Models(store, settings.models, root)
    slots = max(1, len(allocator.inventory().get("train", ())))
    cores = settings.threads or max(1, (os.cpu_count() or 1) // slots)
    onlookers = Onlookers(plugins)
    end_engines(root / "engines")
    engines = Engines(
        backend,
        allocator,
        root / "engines",
        options=engine_options,
        threads=settings.threads or os.cpu_count() or 1,
        idle_seconds=settings.limits.engine_idle_seconds,
        hang_seconds=settings.limits.engine_heartbeat_seconds,
    )
    live_weights = LiveWeights(models.jobs, engines, jobs)
    attempts = Attempts(jobs, files, executor, onlookers, root, settings, cores, live_weights.published)
    by_name = {name: entry.trainer for name, entry in trainers.items()}
    dispatcher = Dispatcher(jobs, attempts, by_name, scheduler, allocator, executor, root / "run" / "bell")
    return Arbor(
        settings,
        plugins,
        trainers,
        default_trainer,
        store,
        jobs,
        files,
        Uploads(files),
        models,
        engines,
        allocator,
        executor,
        onlookers,
        dispatcher,
        LiveJobs(store, root),
        live_weights,
        lock,
    )


def trainer_defaults(
    settings: ServeConfig, plugins: Plugins, default_trainer: str | None
) -> dict[str, TrainerDefaults]:
    """Every installed trainer with its YAML, under what the command line said of it; all of it type-checked.

    Raises:
        ConfigError: a value that the trainer's struct does not take.
    """
    found = {}
    for name, trainer in plugins.all("trainers").items():
        values = config.defaults("trainer", name)
        where = f"trainers.{name}"
        if name == default_trainer and settings.trainer:
            values, where = settings.trainer, "trainer"
        values = config.merged(values, settings.trainers.get(name, {}))
        convert.typed(values, trainer.config, where=where)
        found[name] = TrainerDefaults(trainer, values)
    for name in settings.trainers:
        plugins.get("trainers", name)  # says which name is near
    return found


def locked(root: Path) -> IO[str]:
    """Hold the storage directory, so that no second server works on it.

    Raises:
        ArborError: another server has it, or it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if kind := network_kind(root, Path("/proc/self/mounts")):
            raise ArborError(
                f"the storage directory {root} is on a network file system ({kind}), on which locks and the database "
                "are not safe: set storage=DIR to a directory on a disk of this machine"
            )
        lock = (root / "lock").open("a+")
    except OSError as error:
        raise ArborError(f"cannot write to the storage directory {root}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise ArborError(f"the storage directory {root} is in use by another server (pid {holder})") from None
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def make_private(root: Path) -> None:
    """Close what the server keeps to everybody else. The storage directory itself may hold more, and stays as it is.

    Raises:
        ArborError: it belongs to somebody else.
    """
    try:
        for name in ("files", "jobs", "engines", "run"):
            (root / name).mkdir(exist_ok=True)
            (root / name).chmod(0o700)
        for path in (root / "lock", *root.glob("arbor.db*")):
            path.chmod(0o600)
    except OSError as error:
        raise ArborError(f"cannot make {error.filename} private: {error.strerror}") from None


def network_kind(folder: Path, mounts: Path) -> str | None:
    """The type of the file system that holds a folder if it is another machine's, as the list of mounts says."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:  # not Linux: it is not known
        return None
    mounted = {Path(fields[1].replace("\\040", " ")): fields[2] for line in lines if len(fields := line.split()) > 2}
    around = (folder.resolve(), *folder.resolve().parents)
    kind = next((mounted[place] for place in around if place in mounted), "")
    return kind if kind in NETWORK else None


def tiny_model(folder: Path) -> None:
    """Write the 1M-parameter base model that demos and tests use.

    Raises:
        ArborError: arbor-sft, which makes it, is not installed.
    """
    try:
        tiny = importlib.import_module("arbor_sft.tiny")
    except ModuleNotFoundError:
        raise ArborError("the tiny model is made by arbor-sft, which is not installed: pip install arbor-sft") from None
    tiny.make(folder)
