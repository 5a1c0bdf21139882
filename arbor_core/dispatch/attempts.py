"""One attempt of a job: its documents, its start, and what is wanted of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from arbor_core.config.settings import ServeConfig
from arbor_core.crash_points import crash_point
from arbor_core.files.repository import Files
from arbor_core.jobdir import resume_points
from arbor_core.jobdir.cleanup import sweep
from arbor_core.jobdir.documents import JobDocument, object_path, read_document, write_order
from arbor_core.jobdir.layout import AttemptDir, JobDir
from arbor_core.jobs.policies import newest_policy
from arbor_core.jobs.records import Job
from arbor_core.jobs.repository import Jobs
from arbor_core.models.catalog import Models
from arbor_core.process.cpu import instruction_set, instruction_set_env
from arbor_core.process.wakeup import wake
from arbor_core.storage.atomic import replace
from arbor_core.storage.background import in_thread
from arbor_core.storage.codec import encode
from arbor_core.types import TERMINAL, AttemptOrder, Executor, Lease, MessageEvent, Placement, Status, Trainer
from arbor_core.worker.launchers import ConfiguredLauncher

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "arbor-core")
MEMORY_RETRY_SHARE = 0.5
"""How large micro-batches are after the job ran out of memory, in parts of what they were."""


class Attempts:
    """Starts attempts, and tells them what is wanted.

    Args:
        launcher: Who starts the ranks of a job with several devices.
        storage: Identity of the storage directory.
        threads: CPU threads of a new job.
        sender: Names the sender of the engines of a model; empty: they take files.
    """

    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        models: Models,
        executor: Executor,
        launcher: ConfiguredLauncher,
        storage: str,
        settings: ServeConfig,
        threads: int,
        sender: Callable[[str], str] = lambda _: "",
    ) -> None:
        self.jobs, self.files, self.models, self.executor = jobs, files, models, executor
        self.launcher = launcher
        self.root, self.storage, self.settings, self.threads = models.root, storage, settings, threads
        self.sender = sender
        self.writing: dict[str, asyncio.Future[None]] = {}
        """By job id: documents that are being written."""

    def dir(self, job: Job) -> JobDir:
        return JobDir.of(self.root, job.id)

    def attempt_dir(self, job: Job) -> AttemptDir:
        return self.dir(job).attempt(job.attempt)

    def python(self, trainer: Trainer) -> str:
        """The interpreter that has a trainer's libraries."""
        return trainer.python or sys.executable

    async def write_document(self, job: Job) -> None:
        """Write `job.json`, once."""
        writing = self.writing[job.id] = asyncio.ensure_future(in_thread(self._write_document, job))
        try:
            await asyncio.shield(writing)
        finally:
            del self.writing[job.id]

    async def end_idle(self, job: Job, to: Status, *events: MessageEvent, **changes: Any) -> Job | None:
        """End a job that no attempt works on, with nothing half-written in its directory; see `Jobs.transition`."""
        if writing := self.writing.get(job.id):
            await asyncio.wait({writing})
        await in_thread(sweep, self.dir(job))
        if to in TERMINAL:
            await in_thread(resume_points.forget, self.dir(job).resume_points)
        return await self.jobs.transition(job, to, *events, **changes)

    def _write_document(self, job: Job) -> None:
        path = self.dir(job).document
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        document = JobDocument(
            storage=self.storage,
            job_id=job.id,
            trainer=job.spec.trainer,
            config=job.spec.config,
            model=job.spec.model_path,
            model_name=job.spec.model,
            adapter=job.spec.adapter_path,
            input=job.spec.input,
            training_file=self.files.stored_path(job.training_file) if job.training_file else None,
            validation_file=self.files.stored_path(job.validation_file) if job.validation_file else None,
            seed=job.spec.seed,
            created_at=job.created_at,
            versions=versions(),
            threads=self.threads,
            cpu=instruction_set(),
        )
        replace(path, encode(document))

    async def start(self, job: Job, trainer: Trainer, lease: Lease, bell: Path) -> str:
        """Start the attempt that `job` is at; returns its ref."""
        order, placement = await in_thread(self.write_order, job, trainer, lease, bell)
        ref = await self.executor.start(order, placement)
        crash_point("attempt.started")
        return ref

    def write_order(self, job: Job, trainer: Trainer, lease: Lease, bell: Path) -> tuple[AttemptOrder, Placement]:
        """Write what the attempt's supervisor and worker read."""
        folder = self.attempt_dir(job)
        folder.path.mkdir(parents=True, exist_ok=True)
        self.write_desired(job)
        crash_point("attempt.desired")
        document = read_document(folder.job)
        share = MEMORY_RETRY_SHARE**job.memory_retries
        placement = Placement(lease.of("train"), document.threads, share)  # threads: other cores must not change sums
        order = AttemptOrder(
            dir=folder.path,
            argv=(),
            env=instruction_set_env(document.cpu, instruction_set({})),
            python=self.python(trainer),
            entry=trainer.entry,
            config_type=object_path(trainer.config),
            base=None if document.model else self.models.locate(document.model_name),
            preload=trainer.preload,
            prove=trainer.prove,
            start=self.settings.start,
            bell=str(bell),
            room_seconds=self.settings.limits.room_seconds,
            handled=newest_policy(self.jobs.store, job.id)[0].handled,
            sender=self.sender(job.spec.model) if job.spec.input != "file" else "",
        )
        if trainer.ranks:
            order = self.launcher.order(order, len(placement.devices))
        write_order(order, placement)
        crash_point("attempt.ordered")
        return order, placement

    def weights(self, job: Job) -> str:
        """Folder or hub id of the weights that a job starts from."""
        return self.models.locate(job.spec.model, job.spec.model_path)

    def write_desired(self, job: Job) -> None:
        """Tell the worker what is wanted of it: a level, so nothing old is ever replayed."""
        replace(self.dir(job).desired, job.instruction.encode(), durable=False)

    async def instruct(self, job: Job) -> None:
        """Make the worker do what is wanted: it pauses by itself between steps, cancelling ends it at once."""
        await in_thread(self.write_desired, job)
        wake(self.dir(job).inbox_bell, job.id)  # it may be waiting for rollouts
        crash_point("attempt.told")
        if job.desired == "cancel":
            await self.end_softly(job)
            crash_point("attempt.signalled")

    async def end_hung(self, job: Job, how: str) -> None:
        """End an attempt that makes no progress any more; a note says how it hung, to whichever server settles it."""
        log.warning("job %s: attempt %d makes no progress: %s", job.id, job.attempt, how)
        with contextlib.suppress(OSError):  # on a full disk it counts as an ordinary crash
            await in_thread(self.attempt_dir(job).hung.write_text, how)
        await self.end_softly(job)

    async def end_softly(self, job: Job) -> None:
        """Have an attempt end by itself, or be killed after its grace. Whose it is its directory says: in a copy of a
        storage directory the job's ref is the original's."""
        with asking_executor():
            if ref := await self.executor.adopt(self.attempt_dir(job).path):
                await self.executor.signal(ref, signal.SIGTERM)

    async def find(self, job: Job) -> Job | None:
        """Look for an attempt that seems not to live. Its ref may not be the right one: the server ended while it was
        started, or it was started a second time because the first start took too long. One that has not begun yet
        never will. None: nobody runs it."""
        folder = self.attempt_dir(job).path
        with asking_executor():
            ref = await self.executor.adopt(folder)
            if not ref or ref not in await self.executor.poll({ref: folder}):
                return None
        return job if ref == job.ref else await self.jobs.note_ref(job, ref)


@contextlib.contextmanager
def asking_executor() -> Iterator[None]:
    """A block that asks an executor. Whatever it raises, a mistake of its author's included, says nothing of the job:
    the server asks again.

    Raises:
        OSError: in place of any other exception.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"the executor failed: {type(error).__name__}: {error}") from error


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that decide a run's outcome, without importing them."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
