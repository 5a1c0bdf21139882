"""Moves jobs from where they are towards what was asked: validate, plan, claim, start, follow, settle.

One loop decides; a task per job does what takes time. Everything it knows is in the database and in the job
directories, so a dispatcher that starts finds what an earlier one left.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

from .attempts import Attempts, keep_lease, note_ref
from .bell import URGENT, Bell
from .faults import crash_point
from .jobs import Jobs
from .leftovers import sweep
from .pulse import Watch
from .records import InLine, Job, JobError
from .room import is_full
from .settlement import Settlement
from .types import (
    Allocator,
    ArborError,
    Bundle,
    Claim,
    Event,
    Executor,
    Lease,
    QueuedJob,
    RunningJob,
    Scheduler,
    Snapshot,
    Status,
    Trainer,
)
from .validate import Validators

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
GATHER_SECONDS = 0.03
"""Events that come within this time are taken in one transaction."""
CHECKED = 16
"""Jobs that are in validation at the same time."""
LINE = 250
"""How much of a long queue the scheduler sees: so many of the oldest, and so many of the highest priority."""


class Dispatcher:
    """Runs the jobs of one storage directory."""

    def __init__(
        self,
        jobs: Jobs,
        attempts: Attempts,
        trainers: Mapping[str, Trainer],
        scheduler: Scheduler,
        allocator: Allocator,
        executor: Executor,
        bell: Path,
    ) -> None:
        self.jobs, self.attempts, self.trainers = jobs, attempts, trainers
        self.scheduler, self.allocator, self.executor, self.bell = scheduler, allocator, executor, bell
        self.settlement = Settlement(attempts)
        self.leases: dict[str, Lease] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.rung: dict[str, asyncio.Event] = {}
        self.urgent: set[str] = set()
        self.awake = asyncio.Event()
        self.validators = Validators()
        self.waiting_told: set[str] = set()
        self.pool = -1

    def wake(self, job_id: str | None = None) -> None:
        """Something changed, for this job or for what can start: look now instead of at the next poll."""
        if job_id in self.rung:
            self.rung[job_id].set()
        self.awake.set()

    def release(self, job_id: str) -> None:
        """Give a job's devices back."""
        if lease := self.leases.pop(job_id, None):
            self.allocator.release(lease)
            self.awake.set()

    async def run(self) -> None:
        """Work until cancelled. Attempts go on without us."""
        bell = Bell(self.bell, self._rang)
        try:
            self._restore()
            while True:
                self.awake.clear()
                began = time.monotonic()
                try:
                    await self._look()
                except Exception:  # a full disk, say: jobs wait, and the next look may succeed
                    log.exception("the jobs could not be looked after")
                await asyncio.sleep(min(time.monotonic() - began, POLL_SECONDS))  # half of the time is for the others
                try:
                    async with asyncio.timeout(POLL_SECONDS):
                        await self.awake.wait()
                except TimeoutError:
                    continue
        finally:
            bell.close()
            for task in self.tasks.values():
                task.cancel()
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    def _rang(self, said: str) -> None:
        job_id = said.removesuffix(URGENT)
        if said != job_id:
            self.urgent.add(job_id)
        if job_id in self.rung:
            self.rung[job_id].set()

    def _restore(self) -> None:
        """Take up the leases of jobs that were running when an earlier server ended; tidy up after others."""
        running = set(self.jobs.ids_with_status("running"))
        for job in self.jobs.with_status("validating_files"):
            sweep(self.attempts.dir(job))
        for row in self.jobs.store.read("SELECT owner, lease FROM leases"):
            if row["owner"] in running:
                lease = msgspec.json.decode(row["lease"], type=Lease)
                self.leases[row["owner"]] = lease
                self.allocator.restore(lease)

    async def _look(self) -> None:
        """Give every job that nobody works on to a task, and start what the scheduler plans."""
        for job in self.jobs.out_of_place():
            if job.id not in self.tasks:
                await self.settle_idle(job)
        for job in self.jobs.with_status("validating_files", CHECKED):
            if job.id not in self.tasks:
                self._spawn(job, self._validate(job))
        for job_id in self.jobs.ids_with_status("running"):
            if job_id not in self.tasks and (found := self.jobs.get(job_id)):
                self._spawn(found, self._follow(found))
        await self._plan()

    def _spawn(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        self.rung[job.id] = asyncio.Event()
        task = self.tasks[job.id] = asyncio.create_task(work, name=job.id)
        task.add_done_callback(lambda done: self._done(job.id, done))

    def _done(self, job_id: str, task: asyncio.Task[None]) -> None:
        self.tasks.pop(job_id, None)
        self.rung.pop(job_id, None)
        if not task.cancelled() and (error := task.exception()):
            log.error("job %s: the server failed to move it on", job_id, exc_info=error)
        else:
            self.awake.set()

    async def settle_idle(self, job: Job) -> None:
        """Do what is asked of a job that no process works on; a job that moves meanwhile is looked at again."""
        found: Job | None = job
        while found is not None and (to := idle_target(found)):
            event = Event("message", f"Fine-tuning job {found.id} {'resumed' if to == 'queued' else to}")
            if await self.jobs.transition(found, to, event):
                self.waiting_told.discard(found.id)
                break
            found = self.jobs.get(found.id)
        self.wake()

    async def _validate(self, job: Job) -> None:
        """Check the job's files in a process of their own, then queue it. Cancelling does not wait for that."""
        trainer = self.trainers.get(job.spec.trainer)
        if trainer is None:
            error = JobError("trainer_missing", f"The trainer '{job.spec.trainer}' is not installed any more")
            await self.jobs.transition(job, "failed", Event("message", error.message, "error"), error=error)
            return
        self.executor.prepare(trainer.python, trainer.preload, trainer.prove)
        papers = await asyncio.to_thread(self.attempts.write_papers, job, trainer)
        crash_point("job.papers")
        if job.spec.rollouts:
            await self.jobs.transition(job, "queued", Event("message", "Moving job to queued state"))
            return
        what = (trainer.python, trainer.check_row, trainer.min_rows, job.training_file, job.validation_file)
        check = asyncio.ensure_future(self.validators.report(papers, self.attempts.python(trainer), what))
        report = await self._unless_cancelled(job, check)
        if report is None:
            return
        crash_point("job.validated")
        warnings = [Event("message", text, "warn") for text in report.warnings]
        if report.error:
            error = JobError(**report.error)
            failed = Event("message", error.message, "error")
            await self.jobs.transition(job, "failed", *warnings, failed, error=error)
        else:
            queued = Event("message", "Files validated, moving job to queued state")
            await self.jobs.transition(job, "queued", *warnings, queued)
        crash_point("job.queued")

    async def _unless_cancelled(self, job: Job, work: asyncio.Future[Any]) -> Any:
        """The result of `work`, or None when the job was cancelled meanwhile."""
        rung = self.rung[job.id]
        while not work.done():
            waiter = asyncio.ensure_future(rung.wait())
            await asyncio.wait([work, waiter], timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            rung.clear()
            fresh = self.jobs.get(job.id)
            if fresh is None or fresh.desired == "cancel" or fresh.status != job.status:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                if fresh:
                    await self.settle_idle(fresh)
                return None
        return work.result()

    async def _plan(self) -> None:
        """Ask the scheduler, and start what it says."""
        await self._set_aside()
        line = [job for job in self.jobs.line(LINE, self.pool, list(self.trainers)) if job.id not in self.tasks]
        if not line:
            return
        plan = self.scheduler.plan(self._snapshot(line))
        for job_id in plan.preempt:
            await self.jobs.preempt(job_id)
            self.wake(job_id)
        ended = await asyncio.gather(*(self._start(job_id) for job_id in plan.start), return_exceptions=True)
        for error in filter(None, ended):  # all have ended: the next look finds none half started
            raise error
        waiting = [job.id for job in line if job.id not in self.waiting_told and job.id not in plan.start]
        if waiting:
            self.waiting_told.update(waiting)
            await self.jobs.note(Event("message", "Waiting for a device"), *waiting)

    def _snapshot(self, line: list[InLine]) -> Snapshot:
        running = [
            RunningJob(job.id, claim_of(job.id, job.devices), job.seq, job.priority, job.waited, job.stopping)
            for job in self.jobs.running()
        ]
        ended = self.leases.keys() - {job.id for job in running}  # they give their devices back any moment
        return Snapshot(
            queued=tuple(
                QueuedJob(job.id, claim_of(job.id, job.devices), job.seq, job.priority, job.waited) for job in line
            ),
            running=(
                *running,
                *(RunningJob(owner, self.leases[owner].claim, 0, stopping=True) for owner in sorted(ended)),
            ),
            free=dict(self.allocator.free()),
        )

    async def _set_aside(self) -> None:
        """Say of jobs that this server, started otherwise than the one that took them, cannot run: they wait for one
        that can, and hold nobody back."""
        pool = len(self.allocator.inventory().get("train", ()))
        if pool == self.pool:
            return
        self.pool = pool
        for job in self.jobs.left_out(pool, list(self.trainers)):
            reason = f"it needs {job.spec.devices} devices to train on, and this server has {pool}"
            if job.spec.trainer not in self.trainers:
                reason = f"the trainer '{job.spec.trainer}' is not installed any more"
            await self.jobs.note(Event("message", f"This job cannot start here: {reason}", "warn"), job.id)

    async def _start(self, job_id: str) -> None:
        """Claim devices, become `running`, start the attempt; a job that is cancelled meanwhile leaves nothing held."""
        job = self.jobs.get(job_id)
        if job is None or job.status != "queued" or job.desired not in ("run", "finish"):
            return
        trainer = self.trainers[job.spec.trainer]
        try:
            async with asyncio.timeout(POLL_SECONDS):
                lease = await self.allocator.acquire(claim_of(job.id, job.spec.devices))
        except TimeoutError:  # somebody else took the devices: plan again
            return
        except ArborError as error:
            failed = JobError("insufficient_devices", str(error))
            await self.jobs.transition(job, "failed", Event("message", failed.message, "error"), error=failed)
            return
        self.leases[job.id] = lease
        crash_point("lease.acquired")
        self.waiting_told.discard(job.id)
        started = Event("message", "Fine-tuning job started", data={"devices": [d.id for d in lease.of("train")]})
        try:
            moved = await self.jobs.transition(
                job,
                "running",
                started,
                attempt=job.attempt + 1,
                only_if=job.desired,
                also=lambda db: keep_lease(db, lease),
            )
        except sqlite3.Error:  # a full disk, say: it waits for the next look, and so do the devices
            self.release(job.id)
            raise
        fresh = self.jobs.get(job.id)
        if not moved or fresh is None:
            self.release(job.id)
            return
        crash_point("job.running")
        self._spawn(fresh, self._launch(fresh, trainer, lease))

    async def _launch(self, job: Job, trainer: Trainer, lease: Lease) -> None:
        try:
            ref = await self._started(job, trainer, lease)
        except OSError as error:
            log.exception("job %s: attempt %d did not start", job.id, job.attempt)
            await self.settlement.not_started(job, error)
            self.release(job.id)
            return
        if ref:
            await note_ref(self.jobs, job, ref)
        crash_point("attempt.noted")
        fresh = self.jobs.get(job.id)
        if fresh:
            await self._follow(fresh)

    async def _started(self, job: Job, trainer: Trainer, lease: Lease) -> str | None:
        """Start the attempt, and wait for room on a full disk; its ref, or None: something else is wanted meanwhile.

        Raises:
            OSError: it cannot be started, or there was no room for `limits.room_seconds`.
        """
        until = time.monotonic() + self.attempts.settings.limits.room_seconds
        while True:
            try:
                return await self.attempts.start(job, trainer, lease, self.bell)
            except OSError as error:
                if not is_full(error, self.attempts.root) or time.monotonic() > until:
                    raise
                log.warning("job %s: attempt %d waits for room on the disk: %s", job.id, job.attempt, error)
            await asyncio.sleep(POLL_SECONDS)
            fresh = self.jobs.get(job.id)
            if fresh is None or fresh.wanted != "run":
                return None

    async def _follow(self, job: Job) -> None:
        """Take an attempt's events as they come until it has ended, then settle the job."""
        rung = self.rung[job.id]
        told, watch = "run", Watch(self.attempts.attempt_dir(job) / "heartbeat")
        while True:
            rung.clear()
            self.urgent.discard(job.id)
            ended = self.attempts.exit(job)  # before the events: what is written before it is then all there
            alive = ended is None and job.ref is not None and self.executor.poll(job.ref)
            if ended is None and not alive:
                ended = self.attempts.exit(job)
                alive = ended is None and await self.attempts.find(job)
            job = await self.attempts.collect(self.jobs.get(job.id) or job)
            if not alive:
                crash_point("attempt.ended")
                await self.settlement.settle(job, ended)
                crash_point("job.settled")
                self.release(job.id)
                crash_point("lease.released")
                return
            if job.wanted != told:
                self.attempts.pass_on(job)
                told = job.wanted
            if watch.silent() > self.attempts.settings.limits.heartbeat_seconds:
                self.attempts.end_hung(job)
                watch = Watch(watch.path)
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await rung.wait()
                    await asyncio.sleep(0 if job.id in self.urgent else GATHER_SECONDS)
            except TimeoutError:
                continue


def idle_target(job: Job) -> Status | None:
    """Where a job that no process works on should be instead, if not where it is."""
    if job.status not in ("validating_files", "queued", "paused"):
        return None
    if job.desired == "cancel" or (job.desired == "finish" and job.attempt == 0):  # nothing was trained
        return "cancelled"
    if job.desired == "finish" and job.status == "paused":
        return "queued"
    if job.desired == "pause" and job.status == "queued":
        return "paused"
    if job.desired == "run" and job.status == "paused":
        return "queued"
    return None


def claim_of(job_id: str, devices: int) -> Claim:
    """What a job needs in order to train."""
    return Claim(job_id, (Bundle("train", devices),))
