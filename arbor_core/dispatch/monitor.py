"""Monitors attempts: takes their events as they come until they have ended, then settles their jobs.

An attempt's files are read when it has woken the server, or when something is asked of its job. Wake-ups get lost, and
a supervisor that was killed sends none: one patrol goes round all attempts once a second, in one batch, and wakes those
that have news, that live no more, or that hang. Which of them live, and which make progress, the executor says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from arbor_core.config.settings import LimitsConfig
from arbor_core.crash_points import crash_point
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.jobs.records import Job
from arbor_core.process.wakeup import URGENT
from arbor_core.storage.background import in_thread
from arbor_core.types import Desired, Executor, MessageEvent

from .attempts import Attempts, asking_executor
from .ingest import Ingest
from .outcome import Outcomes

log = logging.getLogger(__name__)
PATROL_SECONDS = 1.0
POLL_SECONDS = 30.0
"""How long an executor may take to say which attempts live."""
UNREADABLE = (msgspec.MsgspecError, ArithmeticError, LookupError, TypeError, ValueError)
"""What a log raises that was damaged, or that a trainer has written nonsense into."""
GATHER_SECONDS = 0.03
"""Events that come within this time are taken in one transaction."""


@dataclass
class Progress:
    """Counts the rounds in which an attempt made no progress. It compares no clocks: a clock that is set ends no
    attempt, and after this server or the machine stood still a trainer has missed one beat, however long that was."""

    beat: str | None = None
    """What its executor said in the last round; None before the first step."""
    missed: int = 0
    """Rounds in a row without a new beat."""

    def note(self, beat: str | None) -> None:
        """Note what an executor says of a living attempt."""
        self.missed = self.missed + 1 if beat == self.beat else 0
        self.beat = beat


@dataclass
class MonitoredAttempt:
    """An attempt that is monitored."""

    job: Job
    """As it was seen last."""
    files: AttemptDir
    progress: Progress = field(default_factory=Progress)
    wakeup: asyncio.Event = field(default_factory=asyncio.Event)
    urgent: bool = False
    """Clients wait for what it has written: it is taken at once."""
    missing: bool = False
    """It did not live in the last round."""
    hung: str = ""
    """How it hangs; empty: it does not."""
    instruction: Desired = "run"
    """What its worker knows to do."""

    def has_news(self) -> bool:
        """Whether its files hold what nobody has taken yet."""
        try:
            return self.files.events.stat().st_size > self.job.offset
        except FileNotFoundError:
            return False
        except OSError:  # whoever reads them finds out why, and holds up nobody else
            return True


class Monitor:
    """The attempts that are monitored."""

    def __init__(
        self, attempts: Attempts, ingest: Ingest, outcomes: Outcomes, executor: Executor, limits: LimitsConfig
    ) -> None:
        self.attempts, self.ingest, self.outcomes = attempts, ingest, outcomes
        self.executor, self.limits = executor, limits
        self.monitored: dict[str, MonitoredAttempt] = {}
        self.silent_since: float | None = None
        """When the executor first could not say who lives, on the monotonic clock; None: it can."""
        self.told_of_silence: set[str] = set()
        """The jobs that were told so."""

    def wake(self, message: str) -> None:
        """Look at an attempt now, if it is monitored. `message`: the job's id, and URGENT where clients wait."""
        job_id = message.removesuffix(URGENT)
        if attempt := self.monitored.get(job_id):
            attempt.urgent = attempt.urgent or message != job_id
            attempt.wakeup.set()

    async def monitor(self, job: Job) -> None:
        """Take an attempt's events until it has ended, then settle its job."""
        files = self.ingest.attempt_dir(job)
        attempt = self.monitored[job.id] = MonitoredAttempt(job, files)
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
        folder = self.ingest.attempt_dir(job).path
        with asking_executor():
            while job.ref and job.ref in await self.executor.poll({job.ref: folder}):
                await self.attempts.end_softly(job)
                await asyncio.sleep(PATROL_SECONDS)
        await self.outcomes.unreadable(self.ingest.jobs.get(job.id) or job, error)

    async def _goes_on(self, attempt: MonitoredAttempt) -> bool:
        """Look at an attempt, and tell it what is wanted; False: it has ended, and its job is settled."""
        attempt.wakeup.clear()  # before anything is read: what changes from now on wakes again
        attempt.urgent = False
        unread = await in_thread(self.ingest.read, attempt.job)
        alive = unread.exit is None and await self._lives(attempt)
        if unread.exit is None and not alive:
            unread = await in_thread(self.ingest.read, attempt.job)  # its last words, now that all are there
        job = attempt.job = await self.ingest.take(attempt.job, unread)
        if not alive:
            crash_point("attempt.ended")
            await self.outcomes.settle(job, unread.exit)
            crash_point("job.settled")
            return False
        if job.instruction != attempt.instruction:
            await self.attempts.instruct(job)
            attempt.instruction = job.instruction
        if attempt.hung:
            await self.attempts.end_hung(job, attempt.hung)
            attempt.hung, attempt.progress = "", Progress()
        return True

    async def _lives(self, attempt: MonitoredAttempt) -> bool:
        """Whether somebody runs the attempt: it is taken to live until a round does not find it."""
        if attempt.job.ref is not None and not attempt.missing:
            return True
        if found := await self.attempts.find(attempt.job):
            attempt.job, attempt.missing = found, False
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
        refs = [(attempt, attempt.job.ref) for attempt in self.monitored.values()]
        running = {ref: attempt.files.path for attempt, ref in refs if ref}
        beats, news = await asyncio.gather(self._poll(running), in_thread(look_for_news, refs))
        for (attempt, ref), has_news in zip(refs, news, strict=True):
            if has_news:
                attempt.wakeup.set()
            if beats is not None and ref == attempt.job.ref:  # else another was found meanwhile
                self._note(attempt, beats)
        await self._note_silence(beats is None)

    async def _poll(self, running: Mapping[str, Path]) -> Mapping[str, str | None] | None:
        """What the executor says of all that run; None: it cannot say anything now."""
        if not running:
            return {}
        try:
            async with asyncio.timeout(POLL_SECONDS):
                return await self.executor.poll(running)
        except Exception:  # an executor may raise anything; events are taken meanwhile
            log.exception("the executor cannot say which of %d attempts live", len(running))
            return None

    async def _note_silence(self, silent: bool) -> None:
        """Tell jobs whose attempts nobody can say anything of for long, and when that is over. Nothing is concluded:
        such an attempt may train, so that it keeps its devices, and no other is started."""
        add, told = self.ingest.jobs.add_event, self.told_of_silence
        if not silent:
            self.silent_since = None
            if over := told & self.monitored.keys():
                await add(MessageEvent("It can be said again whether the training process lives"), *sorted(over))
            told.clear()
            return
        now = time.monotonic()
        self.silent_since = now if self.silent_since is None else self.silent_since
        news = {attempt.job.id for attempt in self.monitored.values() if attempt.job.ref} - told
        if news and now - self.silent_since >= self.limits.heartbeat_seconds:
            text = "It cannot be said whether the training process lives: its machine does not answer. "
            text += "It keeps its devices until that is known, and no other one is started"
            told |= news
            await add(MessageEvent(text, "warn"), *sorted(news))

    def _note(self, attempt: MonitoredAttempt, beats: Mapping[str, str | None]) -> None:
        """Note whether an attempt lives and makes progress. One round is too few to hang: it may have come late."""
        ref, progress = attempt.job.ref, attempt.progress
        attempt.missing = ref is None or ref not in beats
        if ref is None or attempt.missing:
            attempt.wakeup.set()
            return
        progress.note(beats[ref])
        limits = self.limits
        allowed = limits.start_seconds if progress.beat is None else limits.heartbeat_seconds
        if progress.missed * PATROL_SECONDS <= max(allowed, PATROL_SECONDS):
            return
        how = f"it made no progress for {allowed:g} seconds and was ended"
        if progress.beat is None:
            how = f"it had not begun to train after {allowed:g} seconds and was ended"
        attempt.hung = how
        attempt.wakeup.set()


def look_for_news(attempts: Iterable[tuple[MonitoredAttempt, object]]) -> list[bool]:
    """Whether the files of each hold what nobody has taken yet."""
    return [attempt.has_news() for attempt, _ in attempts]
