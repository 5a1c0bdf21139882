"""Follows attempts: takes their events as they come until they have ended, then settles their jobs.

Who is followed looks at its files when it rang the bell, or when something is asked of it. Rings get lost, and a keeper
that was killed does not ring: one patrol for all goes round once a second, and wakes those that have news.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.jobdir.heartbeat import HeartbeatMonitor
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.jobs.records import Job
from arbor_core.process.wakeup import URGENT
from arbor_core.types import Desired, Executor

from .attempts import Attempts
from .outcome import Settlement

log = logging.getLogger(__name__)
PATROL_SECONDS = 1.0
UNREADABLE = (msgspec.MsgspecError, ArithmeticError, LookupError, TypeError, ValueError)
"""What a log raises that was damaged, or that a trainer has written nonsense into."""
GATHER_SECONDS = 0.03
"""Events that come within this time are taken in one transaction."""


@dataclass
class Followed:
    """An attempt that is followed."""

    job: Job
    """As it was seen last."""
    files: AttemptDir
    watch: HeartbeatMonitor
    bell: asyncio.Event = field(default_factory=asyncio.Event)
    urgent: bool = False
    """Clients wait for what it has written: it is taken at once."""
    told: Desired = "run"
    """What its worker was told to do."""

    def has_news(self) -> bool:
        """Whether its files hold what nobody has taken yet."""
        try:
            return self.files.events.stat().st_size > self.job.offset
        except FileNotFoundError:
            return False


class Following:
    """The attempts that are followed."""

    def __init__(self, attempts: Attempts, executor: Executor, set_aside: Callable[[Sequence[str]], object]) -> None:
        self.attempts, self.executor = attempts, executor
        self.settlement = Settlement(attempts, set_aside)
        self.followed: dict[str, Followed] = {}

    def wake(self, said: str) -> None:
        """Look at an attempt now, if it is followed. `said`: the job's id, and URGENT where clients wait."""
        job_id = said.removesuffix(URGENT)
        if found := self.followed.get(job_id):
            found.urgent = found.urgent or said != job_id
            found.bell.set()

    async def follow(self, job: Job) -> None:
        """Take an attempt's events until it has ended, then settle its job."""
        folder = self.attempts.attempt_dir(job)
        followed = self.followed[job.id] = Followed(job, folder, HeartbeatMonitor(folder.heartbeat))
        try:
            while await self._goes_on(followed):
                await followed.bell.wait()
                await asyncio.sleep(0 if followed.urgent else GATHER_SECONDS)
        except UNREADABLE as error:  # nor will it be tomorrow: the job would keep its devices for ever
            log.exception("job %s: what attempt %d has told cannot be taken", job.id, job.attempt)
            await self._give_up(followed.job, error)
        finally:
            del self.followed[job.id]

    async def _give_up(self, job: Job, error: Exception) -> None:
        """End an attempt whose events cannot be taken, and its job."""
        while job.ref and self.executor.poll(job.ref):
            self.executor.signal(job.ref, signal.SIGTERM)
            await asyncio.sleep(PATROL_SECONDS)
        await self.settlement.unreadable(self.attempts.jobs.get(job.id) or job, error)

    async def _goes_on(self, followed: Followed) -> bool:
        """Look at an attempt, and tell it what is wanted; False: it has ended, and its job is settled."""
        followed.bell.clear()  # before anything is read: what changes from now on rings again
        followed.urgent = False
        seen = await asyncio.to_thread(self.attempts.look, followed.job)
        alive = seen.ended is None and await self._lives(followed)
        if seen.ended is None and not alive:
            seen = await asyncio.to_thread(self.attempts.look, followed.job)  # its last words, now that all are there
        job = followed.job = await self.attempts.take(followed.job, seen)
        if not alive:
            crash_point("attempt.ended")
            await self.settlement.settle(job, seen.ended)
            crash_point("job.settled")
            return False
        if job.instruction != followed.told:
            await self.attempts.pass_on(job)
            followed.told = job.instruction
        return True

    async def _lives(self, followed: Followed) -> bool:
        """Whether the attempt's keeper lives, wherever it is."""
        job = followed.job
        if job.ref is not None and self.executor.poll(job.ref):
            return True
        if found := await self.attempts.find(job):
            followed.job = found
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
        followed = list(self.followed.values())
        for one, news in zip(followed, await asyncio.to_thread(looked_at, followed), strict=True):
            if news or one.job.ref is None or not self.executor.poll(one.job.ref):
                one.bell.set()
            if self._hangs(one.watch):
                self.attempts.end_hung(one.job)
                one.watch = HeartbeatMonitor(one.watch.path)

    def _hangs(self, watch: HeartbeatMonitor) -> bool:
        """Whether an attempt has shown no sign of life for too long. One look is too few: it may have come late."""
        limits = self.attempts.settings.limits
        allowed = limits.heartbeat_seconds if watch.started else limits.start_seconds
        return watch.missed * PATROL_SECONDS > max(allowed, PATROL_SECONDS)


def looked_at(followed: Iterable[Followed]) -> list[bool]:
    """Look at the heartbeat of each; whether it has news."""
    for one in followed:
        one.watch.check()
    return [one.has_news() for one in followed]
