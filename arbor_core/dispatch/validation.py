"""Brings a new job from `validating_files` to `queued`: its document is written and its files are checked."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from typing import Any

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.data.validator import FileCheck, Report
from arbor_core.files.repository import Files
from arbor_core.jobs.records import Job, JobError
from arbor_core.jobs.repository import Jobs
from arbor_core.process.environment import clean_env
from arbor_core.types import Executor, MessageEvent, Trainer

from .attempts import Attempts

POLL_SECONDS = 1.0


class Validation:
    """The jobs that are in validation."""

    def __init__(
        self, jobs: Jobs, files: Files, attempts: Attempts, executor: Executor, trainers: Mapping[str, Trainer]
    ) -> None:
        self.jobs, self.files, self.attempts = jobs, files, attempts
        self.executor, self.trainers = executor, trainers
        self.validators = Validators()
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
        if job.spec.input != "file":
            await self.jobs.transition(job, "queued", MessageEvent("Moving job to queued state"))
            return
        files = FileCheck(
            trainer.check_row,
            trainer.min_rows,
            str(self.files.path(job.training_file)),
            str(self.files.path(job.validation_file)) if job.validation_file else None,
            trainer.model_check,
            self.attempts.weights(job) if trainer.model_check else None,
        )
        python = self.attempts.python(trainer)
        report = self.validators.good.get((python, files))
        if report is None:
            check = asyncio.ensure_future(self.validators.report(files, python))
            report = await self._unless_cancelled(job, check)
        if report is None:
            return
        crash_point("job.validated")
        warnings = [MessageEvent(text, "warn") for text in report.warnings]
        if report.error:
            await self._fail(job, JobError(**report.error), *warnings)
        else:
            queued = MessageEvent("Files validated, moving job to queued state")
            await self.jobs.transition(job, "queued", *warnings, queued)
        crash_point("job.queued")

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


VALIDATORS = 2
"""Files that are checked at the same time."""


REMEMBERED = 1000


TRIES = 3


class Validators:
    """Checks files, a few at a time. Stored files never change: those that were found good are not read again."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(VALIDATORS)
        self.good: dict[tuple[str, FileCheck], Report] = {}

    async def report(self, files: FileCheck, python: str) -> Report:
        """Check the files of a job with the libraries of an interpreter."""
        what = (python, files)
        if what in self.good:
            return self.good[what]
        async with self.turns:
            report = self.good.get(what) or await validate(files, python)
        if not report.error:
            self.good[what] = report
            if len(self.good) > REMEMBERED:
                del self.good[next(iter(self.good))]
        return report


async def validate(files: FileCheck, python: str) -> Report:
    """Run the validator; one that is killed is no fault of the files and runs again."""
    for _ in range(TRIES):
        code, output, errors = await _validator(files, python)
        if code == 0:
            return msgspec.json.decode(output, type=Report)
        if code != -signal.SIGKILL:
            break
    said = errors.decode(errors="replace").strip().splitlines()
    reason = said[-1] if said else f"it ended with status {code}"
    return Report(error={"code": "invalid_training_file", "message": f"The files could not be checked: {reason}"})


async def _validator(files: FileCheck, python: str) -> tuple[int | None, bytes, bytes]:
    """Exit status, output and errors of one run."""
    process = await asyncio.create_subprocess_exec(
        python,
        "-m",
        "arbor_core.data.validator",
        msgspec.json.encode(files).decode(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_env(),
    )
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    return process.returncode, output, errors
