"""What the end of an attempt means for its job: a model, a pause, a failure, or another attempt."""

from __future__ import annotations

import csv
import io
import logging
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from arbor_core.config.settings import LimitsConfig
from arbor_core.crash_points import crash_point
from arbor_core.files.repository import Files
from arbor_core.jobdir import checkpoints, resume_points
from arbor_core.jobdir.cleanup import reconciled, sweep
from arbor_core.jobdir.failure_notes import DEVICE_LOST, OUT_OF_MEMORY, read_note
from arbor_core.jobdir.layout import AttemptDir, JobDir, checkpoint_path
from arbor_core.jobs.events import metrics_by_step
from arbor_core.jobs.leases import LeaseEnd, end_leases
from arbor_core.jobs.records import Job, JobError
from arbor_core.jobs.repository import Jobs, keep_paused
from arbor_core.models import memory
from arbor_core.models.catalog import add_model
from arbor_core.process.resources import is_disk_full, public_text, resource_shortage
from arbor_core.storage.background import in_thread
from arbor_core.storage.event_log import tail
from arbor_core.types import (
    TERMINAL,
    CheckpointWithdrawn,
    ErrorEvent,
    Executor,
    Exit,
    MessageEvent,
    PausedEvent,
    ResultEvent,
)

from .attempts import asking_executor
from .ingest import Ingest, view

log = logging.getLogger(__name__)
PIECE = 1 << 16
"""Characters of a result file that are written at once."""


class Outcomes:
    """Moves jobs whose attempts are over to where they belong.

    Args:
        root: The storage directory.
        set_aside: Called with the ids of devices that were lost: nobody gets them any more.
    """

    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        ingest: Ingest,
        executor: Executor,
        root: Path,
        limits: LimitsConfig,
        set_aside: Callable[[Sequence[str]], object] = lambda devices: None,
    ) -> None:
        self.jobs, self.files, self.ingest, self.executor = jobs, files, ingest, executor
        self.root, self.limits, self.set_aside = root, limits, set_aside

    async def settle(self, job: Job, ended: Exit | None) -> None:
        """Move a job whose attempt is over to where it belongs. All its events have been collected."""
        begun = True
        if ended is None:  # its supervisor was killed, or never came to be
            begun = await self._end_attempt(job) or job.ref is not None
            job = await self.ingest.collect(job)  # its worker may have written until now
        job = await self._tidy(job)
        last = await in_thread(last_word, self.ingest.attempt_dir(job))
        if isinstance(last, ResultEvent):
            await self._succeed(job, last)
        elif isinstance(last, ErrorEvent):
            await self._failed(job, JobError(last.code, last.message, last.param))
        elif job.desired == "cancel":
            await self._end(job, "cancelled", MessageEvent(f"Fine-tuning job {job.id} cancelled"))
        elif last is None:
            await self._crashed(job, ended, begun)
        elif last.code:
            data = {"code": last.code, "message": last.message}
            said = MessageEvent(last.message, "error", data=data)
            await self._end(job, "paused", said, also=keep_paused(job.id))
        elif job.preempted and job.desired == "run":
            text = f"Job {job.id} gave its devices to a more urgent one at step {job.progress}, and waits for others"
            await self._end(job, "queued", MessageEvent(text), reason="preempted")
        else:
            await self._end(job, "paused", MessageEvent(f"Fine-tuning job {job.id} paused"))

    async def unreadable(self, job: Job, error: Exception) -> None:
        """End a job whose attempt has ended and whose events cannot be taken."""
        await self._end_attempt(job)
        await in_thread(sweep, JobDir.of(self.root, job.id))
        if job.desired == "cancel":
            await self._end(job, "cancelled", MessageEvent(f"Fine-tuning job {job.id} cancelled"))
            return
        message = (
            f"What the training process told cannot be read ({type(error).__name__}: {error}): "
            f"jobs/{job.id}/attempts/{job.attempt}/events.jsonl in the storage directory, from byte {job.offset} on"
        )
        failed = JobError("event_log_damaged", message)
        await self._end(job, "failed", MessageEvent(message, "error"), error=failed)

    async def _end_attempt(self, job: Job) -> bool:
        """See to it that nothing of an attempt lives, nor ever will; returns whether anybody had begun it.

        Raises:
            TimeoutError: something does not end. It may hold a device, so nobody else may have that yet.
        """
        with asking_executor():
            ref = await self.executor.adopt(self.ingest.attempt_dir(job).path)
            if ref is not None:
                await self.executor.end(ref)
        return ref is not None

    async def _tidy(self, job: Job) -> Job:
        """Remove what the attempt left, and tell of checkpoints what it could not tell any more."""
        await in_thread(sweep, JobDir.of(self.root, job.id))
        if missed := await in_thread(reconciled, self.ingest.attempt_dir(job)):
            await self.jobs.reconcile(job, missed, self.ingest.model_name(job))
            for event in missed:
                if isinstance(event, CheckpointWithdrawn):  # after that was written down: what is offered is there
                    damaged = JobDir.of(self.root, job.id).checkpoints / event.dir
                    await in_thread(checkpoints.set_aside, damaged)
            job = self.jobs.get(job.id) or job
        crash_point("attempt.tidied")
        return job

    async def _end(
        self, job: Job, status: Any, *events: MessageEvent, reason: LeaseEnd | None = None, **changes: Any
    ) -> None:
        """Leave `running`, and end the lease in the same transaction.

        Args:
            reason: Why the lease ends; None: what became of the job.
        """
        also = changes.pop("also", None)
        if status in TERMINAL:
            await in_thread(resume_points.forget, JobDir.of(self.root, job.id).resume_points)

        def give_back(db: sqlite3.Connection) -> None:
            end_leases(db, job.id, reason or status)
            if also:
                also(db)

        if await self.jobs.transition(job, status, *events, also=give_back, ref=None, **changes):
            seen = view(job)
            seen.status = status
            for event in events:
                self.ingest.observers.notify(seen, event)

    async def _succeed(self, job: Job, result: ResultEvent) -> None:
        name = self.ingest.model_name(job)
        name_of_file, metrics = f"{job.id}-metrics.csv", self.metrics_csv(job)
        file_id, insert = await self.files.add_pieces(job.owner, name_of_file, metrics, "fine-tune-results")
        crash_point("result.stored")

        def register(db: sqlite3.Connection) -> None:
            insert(db)
            add_model(
                db,
                name=name,
                owner=job.owner,
                job_id=job.id,
                base=job.spec.model,
                base_path=job.spec.model_path or "",
                path=checkpoint_path(job.id, result.dir),
                kind="adapter" if result.adapter else "full",
            )

        await self._end(
            job,
            "succeeded",
            MessageEvent(f"New fine-tuned model created: {name}"),
            MessageEvent("The job has successfully completed"),
            fine_tuned_model=name,
            trained_tokens=result.trained_tokens,
            result_files=[file_id],
            also=register,
        )

    async def _failed(self, job: Job, error: JobError) -> None:
        """The attempt says why it cannot go on. Out of memory, it is tried once more with smaller micro-batches."""
        if error.code == OUT_OF_MEMORY and job.memory_retries == 0 and job.desired != "cancel":
            text = (
                f"The training process ran out of memory ({error.message}); attempt {job.attempt + 1} starts "
                f"{starting_point(job)}, with micro-batches half the size where the trainer can cut them: gradients "
                "are the same but for their last digits, and digests are others than without this"
            )
            await self._end(job, "queued", MessageEvent(text, "warn"), reason="out_of_memory", memory_retries=1)
            return
        if error.code == DEVICE_LOST:
            await self._lost(job, error)
            return
        if error.code == OUT_OF_MEMORY:
            advice = memory.advice(job.spec.config, trains_all=job.spec.trains_all)
            what = f"{error.message.rstrip('.')}. The job does not fit in memory: {advice}"
            error = JobError(error.code, what, error.param)
        reason: LeaseEnd = "out_of_memory" if error.code == OUT_OF_MEMORY else "failed"
        await self._end(job, "failed", MessageEvent(error.message, "error"), reason=reason, error=error)

    async def _lost(self, job: Job, error: JobError) -> None:
        """A device is gone: nobody gets it any more, and the job is tried again on another, when there is one."""
        note = read_note(self.ingest.attempt_dir(job).path)
        devices = note.devices if note else []
        names = ", ".join(devices) or "a device"
        log.warning("job %s lost %s, which nobody gets before this server starts again", job.id, names)
        self.set_aside(devices)
        crashes = job.crashes + 1
        text = f"The training process lost {names} ({error.message.rstrip('.')})"
        if crashes >= self.limits.attempts or job.desired == "cancel":
            failed = JobError(error.code, f"{text}. It died {crashes} times without progress")
            await self._end(job, "failed", MessageEvent(failed.message, "error"), reason="device_lost", error=failed)
            return
        text += f", set aside until the server starts again; attempt {job.attempt + 1} starts {starting_point(job)}"
        data = {"code": DEVICE_LOST, "devices": devices}
        warning = MessageEvent(text, "warn", data=data)
        await self._end(job, "queued", warning, reason="device_lost", crashes=crashes)

    async def _crashed(self, job: Job, ended: Exit | None, begun: bool) -> None:
        """The attempt died without a word: try again from the last checkpoint, unless that leads nowhere."""
        if not begun:
            text = f"The server ended before attempt {job.attempt} began; another one starts"
            await self._end(job, "queued", MessageEvent(text, "warn"), reason="not_started")
            return
        hung = read_hung(self.ingest.attempt_dir(job))
        how = hung or ("its supervisor was lost" if ended is None else describe_exit(ended.code))
        reason: LeaseEnd = "hung" if hung else "crashed"
        crashes = job.crashes + 1
        if crashes >= self.limits.attempts:
            error = JobError(
                "worker_hung" if hung else "worker_crashed",
                f"The training process died {crashes} times without progress; the last time {how}. "
                f"Its output: jobs/{job.id}/attempts/{job.attempt}/worker.log in the storage directory",
            )
            await self._end(job, "failed", MessageEvent(error.message, "error"), reason=reason, error=error)
            return
        text = f"The training process died ({how}); attempt {job.attempt + 1} starts {starting_point(job)}"
        await self._end(job, "queued", MessageEvent(text, "warn"), reason=reason, crashes=crashes)

    async def not_started(self, job: Job, error: Exception) -> None:
        """The attempt's process could not be made. What the machine was short of it may have again: the job is paused.
        Any other fault of it will not mend itself."""
        try:
            await self._end_attempt(job)  # its start may have failed when it had a process already
            await in_thread(sweep, JobDir.of(self.root, job.id))
        except OSError as failure:
            if not (is_disk_full(failure, self.root) or resource_shortage(failure)):
                raise  # something may live, and hold a device: nobody else may have that yet
            log.warning("job %s: it cannot be seen what lives of attempt %d: %s", job.id, job.attempt, failure)
        code = None
        said = public_text(error, self.root)
        if isinstance(error, OSError) and is_disk_full(error, self.root):
            code = "insufficient_storage"
            message = f"The disk is full ({said}), so the job could not start. Make room and resume it"
        elif isinstance(error, OSError) and (what := resource_shortage(error)):
            code = "insufficient_resources"
            message = f"The job could not start: {what}; the system says '{said}'. Resume it when that has passed"
        if code:
            data = {"code": code, "message": message}
            paused = MessageEvent(message, "error", data=data)
            await self._end(job, "paused", paused, reason="not_started", also=keep_paused(job.id))
            return
        message = f"The training process could not be started: {said}"
        failed = JobError("worker_not_started", message)
        await self._end(job, "failed", MessageEvent(failed.message, "error"), reason="not_started", error=failed)

    def metrics_csv(self, job: Job) -> Iterator[bytes]:
        """OpenAI's result file: one row a step, of the newest attempt that trained it. In pieces, as it is read."""
        text = io.StringIO()
        writer = csv.writer(text)
        columns = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
        for step, metrics in metrics_by_step(self.jobs.store, job.id):
            writer.writerow([step, *(metrics.get(column, "") for column in columns)])
            if text.tell() > PIECE:
                yield text.getvalue().encode()
                text.seek(0)
                text.truncate()
        yield text.getvalue().encode()


def last_word(attempt: AttemptDir) -> ResultEvent | ErrorEvent | PausedEvent | None:
    """How an attempt says that it ended: its last result, error or paused event, or the note of another rank that
    explains it. None: it died without a word."""
    last = None
    for _, event in tail(attempt.events):
        if isinstance(event, ResultEvent | ErrorEvent | PausedEvent):
            last = event
    follows = isinstance(last, ErrorEvent) and last.code == "worker_error"  # from another rank's end, perhaps
    if (last is None or follows) and (note := read_note(attempt.path)):
        return ErrorEvent(note.message, "error", code=note.code)
    return last


def read_hung(attempt: AttemptDir) -> str:
    """How an attempt hung that the server ended; empty: it did not."""
    try:
        return attempt.hung.read_text() or "it made no progress and was ended"  # as former versions marked it
    except FileNotFoundError:
        return ""


def starting_point(job: Job) -> str:
    """Where the next attempt starts."""
    return f"from the checkpoint at step {job.progress}" if job.progress else "from the beginning"


def describe_exit(code: int) -> str:
    """An exit status for people."""
    if code >= 0:
        return f"it ended with status {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"
