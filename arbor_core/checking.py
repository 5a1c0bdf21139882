"""Brings a new job from `validating_files` to `queued`: its papers are written and its files are checked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from .attempts import Attempts
from .faults import crash_point
from .jobs import Jobs
from .records import Job, JobError
from .types import Event, Executor, Trainer
from .validate import Report, Validators

POLL_SECONDS = 1.0


class Checking:
    """The jobs that are in validation."""

    def __init__(self, jobs: Jobs, attempts: Attempts, executor: Executor, trainers: Mapping[str, Trainer]) -> None:
        self.jobs, self.attempts, self.executor, self.trainers = jobs, attempts, executor, trainers
        self.validators = Validators()
        self.rung: dict[str, asyncio.Event] = {}

    def ring(self, job_id: str) -> None:
        """Something is asked of a job that may be in validation."""
        if found := self.rung.get(job_id):
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
        papers = await asyncio.to_thread(self.attempts.write_papers, job, trainer)
        crash_point("job.papers")
        if job.spec.rollouts:
            await self.jobs.transition(job, "queued", Event("message", "Moving job to queued state"))
            return
        what = (trainer.python, trainer.check_row, trainer.min_rows, job.training_file, job.validation_file)
        report = self.validators.good.get(what)
        if report is None:
            check = asyncio.ensure_future(self.validators.report(papers, self.attempts.python(trainer), what))
            report = await self._unless_cancelled(job, check)
        if report is None:
            return
        crash_point("job.validated")
        warnings = [Event("message", text, "warn") for text in report.warnings]
        if report.error:
            await self._fail(job, JobError(**report.error), *warnings)
        else:
            queued = Event("message", "Files validated, moving job to queued state")
            await self.jobs.transition(job, "queued", *warnings, queued)
        crash_point("job.queued")

    async def _fail(self, job: Job, error: JobError, *before: Event) -> None:
        await self.jobs.transition(job, "failed", *before, Event("message", error.message, "error"), error=error)

    async def _unless_cancelled(self, job: Job, work: asyncio.Future[Report]) -> Report | None:
        """The result of `work`, or None: the job was cancelled meanwhile, and whoever sees it next settles it."""
        rung = self.rung[job.id] = asyncio.Event()
        try:
            while not work.done():
                waiter = asyncio.ensure_future(rung.wait())
                both: list[asyncio.Future[Any]] = [work, waiter]
                await asyncio.wait(both, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                waiter.cancel()
                rung.clear()
                fresh = self.jobs.get(job.id)
                if fresh is None or fresh.desired == "cancel" or fresh.status != job.status:
                    return None
            return work.result()
        finally:
            del self.rung[job.id]
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
