"""Brings a new job from `validating_files` to `queued`: its document is written and its files are checked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.data.validator import UNSEEN, FileCheck, Report
from arbor_core.files.repository import Files
from arbor_core.jobs.records import Job, JobError
from arbor_core.jobs.repository import Jobs
from arbor_core.process.output import last_words, output_of
from arbor_core.types import Executor, MessageEvent, Trainer

from .attempts import Attempts
from .inspection import Inspections, Serving

POLL_SECONDS = 1.0


class Validation:
    """The jobs that are in validation."""

    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        attempts: Attempts,
        executor: Executor,
        trainers: Mapping[str, Trainer],
        serving: Serving,
    ) -> None:
        self.jobs, self.files, self.attempts = jobs, files, attempts
        self.executor, self.trainers = executor, trainers
        turns = asyncio.Semaphore(PROCESSES)
        self.validators, self.inspections = Validators(turns), Inspections(serving, turns)
        self.wakeups: dict[str, asyncio.Event] = {}

    def wake(self, job_id: str) -> None:
        """Something is asked of a job that may be in validation."""
        if found := self.wakeups.get(job_id):
            found.set()

    async def check(self, job: Job) -> None:
        """Check the job's files in a process of their own, then queue it. Cancelling does not wait for that."""
        trainer = self.trainers.get(job.spec.trainer)
        if trainer is None:
            await self._fail(
                job, JobError("trainer_missing", f"The trainer '{job.spec.trainer}' is not installed any more")
            )
            return
        self.executor.prepare(trainer.python, trainer.preload, trainer.prove)
        fresh = self.jobs.get(job.id)
        if fresh is None or fresh.status != job.status or fresh.desired == "cancel":
            return  # it may end at any moment, and nobody may be writing into its directory then
        await self.attempts.write_document(job)
        crash_point("job.document")
        report = await self._unless_cancelled(job, asyncio.ensure_future(self._report(job, trainer)))
        if report is None:
            return
        crash_point("job.validated")
        warnings = [MessageEvent(text, "warn") for text in report.warnings]
        if report.error:
            await self._fail(job, JobError(**report.error), *warnings)
        else:
            done = "Files validated, moving" if job.spec.input == "file" else "Moving"
            await self.jobs.transition(job, "queued", *warnings, MessageEvent(f"{done} job to queued state"))
        crash_point("job.queued")

    async def _report(self, job: Job, trainer: Trainer) -> Report:
        """What is found of a job's files, and of the modules that it trains."""
        python = self.attempts.python(trainer)
        report = Report()
        if job.spec.input == "file":
            files = FileCheck(
                trainer.check_row,
                trainer.min_rows,
                str(self.files.path(job.training_file)),
                str(self.files.path(job.validation_file)) if job.validation_file else None,
                trainer.model_check,
                self.attempts.weights(job) if trainer.model_check else None,
            )
            report = await self.validators.report(files, python)
        if report.error or not self.inspections.needed(job.spec, trainer):
            return report
        found = await self.inspections.report(job.spec, trainer, python, self.attempts.weights(job))
        return Report(report.rows, [*report.warnings, *found.warnings], found.error)

    async def _fail(self, job: Job, error: JobError, *before: MessageEvent) -> None:
        await self.attempts.end_idle(job, "failed", *before, MessageEvent(error.message, "error"), error=error)

    async def _unless_cancelled(self, job: Job, work: asyncio.Future[Report]) -> Report | None:
        """The result of `work`, or None: the job was cancelled meanwhile, and whoever sees it next settles it."""
        wakeup = self.wakeups[job.id] = asyncio.Event()
        try:
            while not work.done():
                waiter = asyncio.ensure_future(wakeup.wait())
                both: list[asyncio.Future[Any]] = [work, waiter]
                await asyncio.wait(both, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                waiter.cancel()
                wakeup.clear()
                fresh = self.jobs.get(job.id)
                if fresh is None or fresh.desired == "cancel" or fresh.status != job.status:
                    return None
            return work.result()
        finally:
            del self.wakeups[job.id]
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


PROCESSES = 2
"""Processes that check jobs at the same time."""


REMEMBERED = 1000


class Validators:
    """Checks files, a few at a time. Stored files never change: those that were found good are not read again, unless
    the model's chat template may have changed since."""

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self.turns = turns
        self.good: dict[tuple[Any, ...], Report] = {}

    async def report(self, files: FileCheck, python: str) -> Report:
        """Check the files of a job with the libraries of an interpreter."""
        what = (python, files, await asyncio.to_thread(tokenizer_state, files.model))
        if what in self.good:
            return self.good[what]
        async with self.turns:
            report = self.good.get(what) or await validate(files, python)
        if not report.error and UNSEEN not in report.warnings:
            self.good[what] = report
            if len(self.good) > REMEMBERED:
                del self.good[next(iter(self.good))]
        return report


def tokenizer_state(model: str | None) -> tuple[tuple[str, int, int], ...]:
    """Which files a model's tokenizer and chat template are, when they were changed, and their sizes; nothing of a
    model that is no folder here."""
    if model is None:
        return ()
    try:
        found = [each for each in Path(model).iterdir() if each.name.startswith(("tokenizer", "chat_template"))]
        return tuple(sorted((each.name, (state := each.stat()).st_mtime_ns, state.st_size) for each in found))
    except OSError:
        return ()


async def validate(files: FileCheck, python: str) -> Report:
    """Run the validator."""
    code, output, errors = await output_of(python, "arbor_core.data.validator", files)
    if code == 0:
        return msgspec.json.decode(output, type=Report)
    message = f"The files could not be checked: {last_words(code, errors)}"
    return Report(error={"code": "invalid_training_file", "message": message})
