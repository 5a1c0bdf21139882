"""Moves jobs from where they are towards what was asked: validate, plan, claim, start, monitor, settle.

One loop decides; a task per job does what takes time. Everything it knows is in the database and in the job
directories, so a dispatcher that starts finds what an earlier one left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.jobs.leases import read_leases, write_lease
from arbor_core.jobs.queue import JobQueue, training_claim
from arbor_core.jobs.records import Job, JobError
from arbor_core.jobs.repository import Jobs
from arbor_core.jobs.states import idle_target
from arbor_core.process.resources import is_disk_full, resource_shortage
from arbor_core.process.wakeup import ANSWERED, WakeupSocket
from arbor_core.storage.background import in_background, in_thread
from arbor_core.types import (
    TERMINAL,
    Allocator,
    ArborError,
    DevicesLostError,
    Lease,
    MessageEvent,
    QueuedJob,
    RunningJob,
    Scheduler,
    Snapshot,
    Trainer,
    free_by_node,
    most_on_one_node,
)

from .attempts import Attempts
from .monitor import Monitor
from .validation import Validation

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
CHECKED = 16
"""Jobs that are in validation at the same time."""
STARTED = 8
"""Jobs that are started at the same time: what a start costs the event loop, times so many, keeps requests waiting."""
LINE = 250
"""How much of a long queue the scheduler sees: so many of the oldest, and so many of the highest priority."""


class Dispatcher:
    """Runs the jobs of one storage directory.

    Args:
        answered: Called with a job's id when its trainer has written a result of a command.
    """

    def __init__(
        self,
        jobs: Jobs,
        attempts: Attempts,
        validation: Validation,
        monitor: Monitor,
        trainers: Mapping[str, Trainer],
        scheduler: Scheduler,
        allocator: Allocator,
        bell: Path,
        room_seconds: float,
        answered: Callable[[str], object] = lambda job_id: None,
    ) -> None:
        self.jobs, self.attempts, self.validation, self.monitor = jobs, attempts, validation, monitor
        self.trainers, self.scheduler, self.allocator = trainers, scheduler, allocator
        self.bell, self.room_seconds, self.answered = bell, room_seconds, answered
        self.queue = JobQueue(jobs.store)
        self.leases: dict[str, Lease] = {}
        self.running: dict[str, RunningJob] = {}
        """The jobs whose status is `running`, and those that have left it a moment ago."""
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.awake = asyncio.Event()
        self.told_to_wait: set[str] = set()
        self.pool = -1

    def wake(self, job_id: str | None = None) -> None:
        """Something changed, for this job or for what can start: look now instead of at the next poll."""
        if job_id:
            self.validation.wake(job_id)
            self.monitor.wake(job_id)
        self.awake.set()

    def _woken(self, message: str) -> None:
        """A process of an attempt has written something: an event, or a result of a command."""
        if message.endswith(ANSWERED):
            self.answered(message.removesuffix(ANSWERED))
        else:
            self.monitor.wake(message)

    def release(self, job_id: str) -> None:
        """Give a job's devices back: it does not run any more."""
        self.running.pop(job_id, None)
        if lease := self.leases.pop(job_id, None):
            self.allocator.release(lease)
            self.awake.set()

    async def run(self) -> None:
        """Work until cancelled, behind what clients wait for. Attempts go on without us."""
        async with in_background():
            await self._run()

    async def _run(self) -> None:
        bell = WakeupSocket(self.bell, self._woken)
        patrol = asyncio.create_task(self.monitor.patrol())
        try:
            await self._restore()
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
            ending = [patrol, *self.tasks.values()]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def _restore(self) -> None:
        """Take up the leases of jobs that were running when an earlier server ended."""
        self.running = {job.id: job for job in self.queue.running()}
        for lease in read_leases(self.jobs.store):
            if lease.claim.owner in self.running:
                self.leases[lease.claim.owner] = lease
                self.allocator.restore(lease)
                held = msgspec.structs.replace(self.running[lease.claim.owner], nodes=lease.nodes())
                self.running[lease.claim.owner] = held

    async def _look(self) -> None:
        """Give every job that nobody works on to a task, and start what the scheduler plans."""
        for job in self.queue.out_of_place():
            if job.id not in self.tasks:
                await self.settle_idle(job)
        for job_id in self.jobs.ids_with_status("validating_files", CHECKED):
            if job_id not in self.tasks and (new := self.jobs.get(job_id)):
                self._spawn(new.id, self.validation.check(new))
        for job_id in self.running.keys() - self.tasks.keys():
            found = self.jobs.get(job_id)
            if found and found.status == "running":
                self._spawn(job_id, self._monitor(found))
            else:
                self.release(job_id)
        await self._plan()

    def _spawn(self, job_id: str, work: Coroutine[Any, Any, None]) -> None:
        task = self.tasks[job_id] = asyncio.create_task(work, name=job_id)
        task.add_done_callback(lambda done: self._done(job_id, done))

    def _done(self, job_id: str, task: asyncio.Task[None]) -> None:
        self.tasks.pop(job_id, None)
        if not task.cancelled() and (error := task.exception()):
            log.error("job %s: the server failed to move it on", job_id, exc_info=error)
        else:
            self.awake.set()

    async def settle_idle(self, job: Job) -> None:
        """Do what is asked of a job that no process works on; a job that moves meanwhile is looked at again."""
        found: Job | None = job
        while found is not None and (to := idle_target(found)):
            event = MessageEvent(f"Fine-tuning job {found.id} {'resumed' if to == 'queued' else to}")
            move = self.attempts.end_idle if to in TERMINAL else self.jobs.transition
            if await move(found, to, event):
                self.told_to_wait.discard(found.id)
                break
            found = self.jobs.get(found.id)
        self.wake()

    async def _plan(self) -> None:
        """Ask the scheduler, and start what it says."""
        await self._set_aside()
        first = await in_thread(self.queue.next_jobs, LINE, self.pool, list(self.trainers))
        line = [job for job in first if job.id not in self.tasks]
        if not line:
            return
        plan = self.scheduler.plan(self._snapshot(line))
        for job_id in plan.preempt:
            await self.jobs.preempt(job_id)
            self.wake(job_id)
        starting = asyncio.Semaphore(STARTED)
        ended = await asyncio.gather(
            *(self._start_in_turn(job_id, starting) for job_id in plan.start), return_exceptions=True
        )
        for error in filter(None, ended):  # all have ended: the next look finds none half started
            raise error
        waiting = [job.id for job in line if job.id not in self.told_to_wait and job.id not in plan.start]
        if waiting:
            self.told_to_wait.update(waiting)
            await self.jobs.add_event(MessageEvent("Waiting for a device"), *waiting)

    def _snapshot(self, line: list[QueuedJob]) -> Snapshot:
        running = dict(self.running)
        for job_id in self.queue.stopping() & running.keys():
            running[job_id] = msgspec.structs.replace(running[job_id], stopping=True)
        nodes = free_by_node(self.allocator)
        free = {pool: sum(by_node.values()) for pool, by_node in nodes.items()}
        return Snapshot(tuple(line), tuple(running.values()), free, nodes)

    async def _set_aside(self) -> None:
        """Say of jobs that this server, started otherwise than the one that took them, cannot run: they wait for one
        that can, and hold nobody back."""
        pool = most_on_one_node(self.allocator.inventory().get("train", ()))  # a job's devices are on one
        if pool == self.pool:
            return
        self.pool = pool
        for job in self.queue.unschedulable(pool, list(self.trainers)):
            reason = f"it needs {job.spec.devices} devices to train on, and this server has {pool}"
            if job.spec.trainer not in self.trainers:
                reason = f"the trainer '{job.spec.trainer}' is not installed any more"
            await self.jobs.add_event(MessageEvent(f"This job cannot start here: {reason}", "warn"), job.id)

    async def _start_in_turn(self, job_id: str, starting: asyncio.Semaphore) -> None:
        """Start a queued job, when it is its turn."""
        async with starting:
            await self._start(job_id)

    async def _start(self, job_id: str) -> None:
        """Claim devices, become `running`, start the attempt; a job that is cancelled meanwhile leaves nothing held."""
        job = self.jobs.get(job_id)
        if job is None or job.status != "queued" or idle_target(job):
            return
        trainer = self.trainers[job.spec.trainer]
        try:
            async with asyncio.timeout(POLL_SECONDS):
                lease = await self.allocator.acquire(training_claim(job.id, job.spec.devices))
        except (TimeoutError, DevicesLostError):  # somebody else took the devices, or they are gone: plan again
            return
        except ArborError as error:
            failed = JobError("insufficient_devices", str(error))
            await self.attempts.end_idle(job, "failed", MessageEvent(failed.message, "error"), error=failed)
            return
        self.leases[job.id] = lease
        crash_point("lease.acquired")
        self.told_to_wait.discard(job.id)
        devices = lease.of("train")
        where: dict[str, Any] = {"devices": [device.id for device in devices]}
        if node := devices[0].node:
            where["node"] = node
        started = MessageEvent("Fine-tuning job started", data=where)
        try:
            moved = await self.jobs.transition(
                job,
                "running",
                started,
                attempt=job.attempt + 1,
                only_if=job.desired,
                also=lambda db: write_lease(db, lease),
            )
        except BaseException:  # a full disk, say: it waits for the next look, and so do the devices
            self.release(job.id)
            raise
        if moved is None:
            self.release(job.id)
            return
        self.running[job.id] = RunningJob(
            job.id, lease.claim, moved.seq, moved.priority, moved.waited, nodes=lease.nodes()
        )
        crash_point("job.running")
        self._spawn(job.id, self._launch(moved, trainer, lease))

    async def _launch(self, job: Job, trainer: Trainer, lease: Lease) -> None:
        try:
            ref = await self._started(job, trainer, lease)
        except Exception as error:  # an executor may raise anything, and would do so again
            log.exception("job %s: attempt %d did not start", job.id, job.attempt)
            await self.monitor.outcomes.not_started(job, error)
            self.release(job.id)
            return
        noted = await self.jobs.note_ref(job, ref) if ref else self.jobs.get(job.id)
        crash_point("attempt.noted")
        if noted:
            await self._monitor(noted)

    async def _started(self, job: Job, trainer: Trainer, lease: Lease) -> str | None:
        """Start the attempt, and wait for what the machine lacks: room on a disk, descriptors, processes, memory.
        Returns its ref, or None: something else is wanted meanwhile.

        Raises:
            OSError: it cannot be started, or the shortage has lasted for `limits.room_seconds`.
        """
        until = time.monotonic() + self.room_seconds
        while True:
            try:
                return await self._unless_cancelled(job, self.attempts.start(job, trainer, lease, self.bell))
            except OSError as error:
                may_pass = is_disk_full(error, self.attempts.root) or resource_shortage(error)
                if not may_pass or time.monotonic() > until:
                    raise
                log.warning("job %s: attempt %d waits to be started: %s", job.id, job.attempt, error)
            await asyncio.sleep(POLL_SECONDS)
            fresh = self.jobs.get(job.id)
            if fresh is None or fresh.instruction != "run":
                return None

    async def _unless_cancelled(self, job: Job, start: Coroutine[Any, Any, str]) -> str | None:
        """The ref of an attempt that an executor starts, which may take long (a cluster has a queue of its own); None:
        the job was cancelled meanwhile. Whether the attempt has begun nobody knows then: who monitors it asks."""
        starting = asyncio.create_task(start)
        try:
            while True:
                await asyncio.wait([starting], timeout=POLL_SECONDS)
                if starting.done():
                    return starting.result()
                fresh = self.jobs.get(job.id)
                if fresh is None or fresh.desired == "cancel":
                    return None
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    async def _monitor(self, job: Job) -> None:
        await self.monitor.monitor(job)
        self.release(job.id)
        crash_point("lease.released")
