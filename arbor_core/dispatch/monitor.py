"""Monitors attempts: takes their events as they come until they have ended, then settles their jobs.

An attempt's files are read when it has woken the server, or when something is asked of its job. Wake-ups get lost, and
a supervisor that was killed sends none: one patrol goes round all attempts once a second, and wakes those with news.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from arbor_core.config.settings import LimitsConfig
from arbor_core.crash_points import crash_point
from arbor_core.jobdir.heartbeat import HeartbeatMonitor
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.jobs.records import Job
from arbor_core.process.wakeup import URGENT
from arbor_core.types import Desired, Executor

from .attempts import Attempts
from .ingest import Ingest
from .outcome import Outcomes

log = logging.getLogger(__name__)
PATROL_SECONDS = 1.0
UNREADABLE = (msgspec.MsgspecError, ArithmeticError, LookupError, TypeError, ValueError)
"""What a log raises that was damaged, or that a trainer has written nonsense into."""
GATHER_SECONDS = 0.03
"""Events that come within this time are taken in one transaction."""


@dataclass
class MonitoredAttempt:
    """An attempt that is monitored."""

    job: Job
    """As it was seen last."""
    files: AttemptDir
    heartbeat: HeartbeatMonitor
    wakeup: asyncio.Event = field(default_factory=asyncio.Event)
    urgent: bool = False
    """Clients wait for what it has written: it is taken at once."""
    instruction: Desired = "run"
    """What its worker knows to do."""

    def has_news(self) -> bool:
        """Whether its files hold what nobody has taken yet."""
        try:
            return self.files.events.stat().st_size > self.job.offset
        except FileNotFoundError:
            return False


class Monitor:
    """The attempts that are monitored."""

    def __init__(
        self, attempts: Attempts, ingest: Ingest, outcomes: Outcomes, executor: Executor, limits: LimitsConfig
    ) -> None:
        self.attempts, self.ingest, self.outcomes = attempts, ingest, outcomes
        self.executor, self.limits = executor, limits
        self.monitored: dict[str, MonitoredAttempt] = {}

    def wake(self, message: str) -> None:
        """Look at an attempt now, if it is monitored. `message`: the job's id, and URGENT where clients wait."""
        job_id = message.removesuffix(URGENT)
        if attempt := self.monitored.get(job_id):
            attempt.urgent = attempt.urgent or message != job_id
            attempt.wakeup.set()

    async def monitor(self, job: Job) -> None:
        """Take an attempt's events until it has ended, then settle its job."""
        files = self.ingest.attempt_dir(job)
        attempt = self.monitored[job.id] = MonitoredAttempt(job, files, HeartbeatMonitor(files.heartbeat))
        try:
            while await self._goes_on(attempt):
                await attempt.wakeup.wait()
                await asyncio.sleep(0 if attempt.urgent else GATHER_SECONDS)
        except UNREADABLE as error:  # nor will it be tomorrow: the job would keep its devices for ever
            log.exception("job %s: the events of attempt %d cannot be taken", job.id, job.attempt)
            await self._give_up(attempt.job, error)
        finally:
            del self.monitored[job.id]

    async def _give_up(self, job: Job, error: Exception) -> None:
        """End an attempt whose events cannot be taken, and its job."""
        while job.ref and self.executor.poll(job.ref):
            self.executor.signal(job.ref, signal.SIGTERM)
            await asyncio.sleep(PATROL_SECONDS)
        await self.outcomes.unreadable(self.ingest.jobs.get(job.id) or job, error)

    async def _goes_on(self, attempt: MonitoredAttempt) -> bool:
        """Look at an attempt, and tell it what is wanted; False: it has ended, and its job is settled."""
        attempt.wakeup.clear()  # before anything is read: what changes from now on wakes again
        attempt.urgent = False
        unread = await asyncio.to_thread(self.ingest.read, attempt.job)
        alive = unread.exit is None and await self._lives(attempt)
        if unread.exit is None and not alive:
            unread = await asyncio.to_thread(self.ingest.read, attempt.job)  # its last words, now that all are there
        job = attempt.job = await self.ingest.take(attempt.job, unread)
        if not alive:
            crash_point("attempt.ended")
            await self.outcomes.settle(job, unread.exit)
            crash_point("job.settled")
            return False
        if job.instruction != attempt.instruction:
            await self.attempts.instruct(job)
            attempt.instruction = job.instruction
        return True

    async def _lives(self, attempt: MonitoredAttempt) -> bool:
        """Whether the attempt's supervisor lives, wherever it is."""
        job = attempt.job
        if job.ref is not None and self.executor.poll(job.ref):
            return True
        if found := await self.attempts.find(job):
            attempt.job = found
        return found is not None

    async def patrol(self) -> None:
        """Go round until cancelled: wake those that have news, end those that hang."""
        while True:
            await asyncio.sleep(PATROL_SECONDS)
            try:
                await self.go_round()
            except Exception:  # one that cannot be looked at, say: the others are looked at in the next round
                log.exception("the attempts could not be looked after")

    async def go_round(self) -> None:
        """Look at every attempt once."""
        attempts = list(self.monitored.values())
        for attempt, news in zip(attempts, await asyncio.to_thread(look_for_news, attempts), strict=True):
            if news or attempt.job.ref is None or not self.executor.poll(attempt.job.ref):
                attempt.wakeup.set()
            if self._hangs(attempt.heartbeat):
                self.attempts.end_hung(attempt.job)
                attempt.heartbeat = HeartbeatMonitor(attempt.heartbeat.path)

    def _hangs(self, heartbeat: HeartbeatMonitor) -> bool:
        """Whether an attempt has shown no sign of life for too long. One look is too few: it may have come late."""
        allowed = self.limits.heartbeat_seconds if heartbeat.started else self.limits.start_seconds
        return heartbeat.missed * PATROL_SECONDS > max(allowed, PATROL_SECONDS)


def look_for_news(attempts: Iterable[MonitoredAttempt]) -> list[bool]:
    """Look at the heartbeat of each; whether it has news."""
    for attempt in attempts:
        attempt.heartbeat.check()
    return [attempt.has_news() for attempt in attempts]
