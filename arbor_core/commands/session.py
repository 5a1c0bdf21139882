"""The server's side of a job that executes commands (`arbor_core.types.CommandSession`).

A session appends commands to the job's inbox and tells the results that its trainer has written. It keeps in memory
what is not acknowledged, as numbers and places alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from arbor_core.jobdir import commands, inbox, results
from arbor_core.jobdir.inbox_writer import InboxWriter, Sending
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.records import Job
from arbor_core.storage.synced_log import LogDamagedError, Place
from arbor_core.types import NO_RETRY, RETRY_SOON, TERMINAL, ApiError, Result, Sent

log = logging.getLogger(__name__)
ENDING = ("finish", "cancel")
"""What a job is asked to do that takes no new commands."""
WINDOW = 4096
"""Commands that may come before the results of those before them are acknowledged."""
RESULT_BYTES = 256 << 20
"""Unacknowledged results above which no new command is taken. The trainer goes on: it answers what was taken, so there
may be as many bytes more as the commands within the window bring."""
DIGEST_BYTES = 1 << 20
"""Longer commands are hashed beside the event loop."""
FOLLOW_BYTES = 8 << 20
"""Of the results that are told at once, if there is more than one."""
SETTLE_SECONDS = 20.0
"""How long a command that came as its job was asked to end waits for its result before its sender is told to ask again.
"""
LOOK_SECONDS = 1.0
"""How often a session that somebody waits for looks for results, where no wake-up comes."""


class Session:
    """One job's commands and results. Made by `Session.opened`.

    Args:
        folder: The job's directory.
        job: Reads the job's row.
    """

    def __init__(self, folder: JobDir, job: Callable[[], Job]) -> None:
        """Read what is on the disk; blocks, and may be called in any thread.

        Raises:
            OSError, LogDamagedError: the inbox cannot be written, or read.
        """
        self.job, self.inbox, self.results = job, folder.inbox, folder.results
        self._acknowledged = results.acknowledged(self.results)
        self._answered = results.Numbers(self._acknowledged)
        self.places: dict[int, Place] = {}
        """Of the results that are not acknowledged, by number."""
        self.bytes = 0
        """Of these results."""
        self.seen = 0
        """Position up to which results are known."""
        self.digests: dict[int, int] = {}
        """Of the commands that are not acknowledged, by number."""
        self.ended = job().status in TERMINAL
        self.writer = None if self.ended else InboxWriter(folder, self._settle)
        self.sending: dict[int, Sending] = {}
        """Commands that are being written, by number."""
        self.waiting: dict[int, set[asyncio.Future[None]]] = {}
        """Who waits for results, by number."""
        self.looking, self.acknowledging = asyncio.Lock(), asyncio.Lock()
        self.woken = asyncio.Event()
        """Set when there may be a result."""
        if self.writer:
            try:
                self._read_inbox(self.writer.inbox.end)
            except BaseException:
                self.writer.close()
                raise

    def _read_inbox(self, end: int) -> None:
        """Take note of the commands that came while earlier servers ran."""
        for place in inbox.places(self.inbox, 0, end):
            if place.number > self._acknowledged:
                self.digests.setdefault(place.number, place.digest)

    @classmethod
    async def opened(cls, folder: JobDir, job: Callable[[], Job]) -> Session:
        """A session that knows what is on the disk, and learns of more.

        Raises:
            OSError: the inbox cannot be written, for example.
            ApiError: 500: it is damaged, or the results are.
        """
        with readable(job):
            session = await asyncio.to_thread(cls, folder, job)
        session.watching = asyncio.create_task(session._watch())
        try:
            await session._look()
            await asyncio.to_thread(results.drop, session.results, session._needed())  # an earlier server died before
        except BaseException:
            session.close()
            raise
        return session

    watching: asyncio.Task[None]

    @property
    def acknowledged(self) -> int:
        return self._acknowledged

    @property
    def answered(self) -> int:
        return self._answered.until

    async def send(self, payload: bytes, number: int, digest: int | None = None) -> Sent:
        if digest is None and len(payload) > DIGEST_BYTES:  # it takes a while
            digest = await asyncio.to_thread(commands.digest_of, payload)
        entry = commands.entry(payload, number, digest)
        if await self._known(entry):
            await self._settled(number)
            return Sent(number, repeated=True)
        writer = self._writer()
        if number > self._acknowledged + WINDOW:
            message = f"Command {number} comes too early: {WINDOW} may come before their results are acknowledged, and "
            message += f"results up to {self._acknowledged} are. Get results and acknowledge them."
            raise ApiError(429, message, "too_many_commands", "number", RETRY_SOON)
        if self.bytes > RESULT_BYTES:
            message = f"{self.bytes} bytes of results are not acknowledged, more than {RESULT_BYTES}: get them first."
            raise ApiError(429, message, "too_many_results", "number", RETRY_SOON)
        sending = self.sending[number] = writer.send(entry)
        await asyncio.shield(sending.position)
        await self._settled(number)
        return Sent(number)

    async def _settled(self, number: int) -> None:
        """Return when it is certain that a command on the disk is executed, once all before it have come. While nobody
        has asked the job to end, it is: the trainer looks into the inbox after it has heard of that. Otherwise it may
        have looked before.

        Raises:
            ApiError: 400: the job has ended without it; 409: nobody knows yet.
        """
        job = self.job()
        if number in self._answered or (job.status not in TERMINAL and job.desired not in ENDING):
            return
        await self._wait(number, SETTLE_SECONDS)
        if number in self._answered:
            return
        if self.ended:
            message = f"Command {number} came too late: job {job.id} has ended ({self.job().status}) without it."
            raise ApiError(400, message, "invalid_job_state", "job_id")
        message = f"Job {job.id} was asked to {job.desired}; whether it executes command {number} is not known yet."
        raise ApiError(409, message, "command_pending", "number", RETRY_SOON)

    async def _known(self, entry: inbox.Entry) -> bool:
        """Whether a command came before, the same.

        Raises:
            ApiError: it was another one, or was acknowledged already; or its number is none.
        """
        if not 1 <= entry.number < 1 << 63:
            message = f"Invalid 'number': {entry.number}. Commands are numbered 1, 2, 3 and so on."
            raise ApiError(400, message, "invalid_value", "number")
        if sending := self.sending.get(entry.number):
            before: int | None = sending.entry.digest
            if before == entry.digest:
                await asyncio.shield(sending.position)
        else:
            before = self.digests.get(entry.number)
        if before is None and entry.number <= self._acknowledged:
            message = f"Command {entry.number} was executed, and its result acknowledged: take the next number."
            raise ApiError(400, message, "command_acknowledged", "number")
        if before is not None and before != entry.digest:
            message = f"Number {entry.number} was used for another command: take the next number."
            raise ApiError(400, message, "command_number_reuse", "number")
        return before is not None

    def _writer(self) -> InboxWriter:
        """The way into the inbox.

        Raises:
            ApiError: the job takes no commands any more.
        """
        job = self.job()
        if job.status in TERMINAL or self.writer is None:
            message = f"Job {job.id} takes no commands: it has ended ({job.status})."
            raise ApiError(400, message, "invalid_job_state", "job_id")
        if job.desired in ENDING:
            message = f"Job {job.id} takes no more commands: it was asked to {job.desired}."
            raise ApiError(400, message, "invalid_job_state", "job_id")
        return self.writer

    def _settle(self, sending: Sending, position: int | Exception) -> None:
        number, digest, _ = sending.entry
        self.sending.pop(number, None)
        if not isinstance(position, Exception):
            self.digests[number] = digest

    async def result(self, number: int, seconds: float = 0) -> Result | None:
        found = await self._read(number, number + 1, seconds)
        return found[0] if found else None

    async def follow(self, after: int, seconds: float = 0) -> Sequence[Result]:
        return await self._read(after + 1, self._acknowledged + WINDOW + 1, seconds)

    async def _read(self, first: int, end: int, seconds: float) -> list[Result]:
        """The results of the commands from `first` on and before `end`, up to the first that is missing."""
        self._check_there(first)
        await self._wait(first, seconds)
        wanted: list[Place] = []
        size = 0
        while len(wanted) < end - first and (place := self.places.get(first + len(wanted))):
            size += place.end - place.start
            if wanted and size > FOLLOW_BYTES:
                break
            wanted.append(place)
        with readable(self.job):
            try:
                return await asyncio.to_thread(lambda: [self._load(place) for place in wanted])
            except LogDamagedError:
                self._check_there(first)  # acknowledged and dropped meanwhile
                raise

    def _load(self, place: Place) -> Result:
        return Result(place.number, results.payload(self.results, place))

    def _check_there(self, number: int) -> None:
        if number <= self._acknowledged:
            message = f"The result of command {number} was acknowledged: results up to {self._acknowledged} are gone."
            raise ApiError(400, message, "result_acknowledged", "number")

    async def _wait(self, number: int, seconds: float) -> None:
        """Wait until a command has a result, or the job has ended."""
        if number in self.places:
            return
        await self._look()
        if number in self.places or self.ended or seconds <= 0:
            return
        future = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(number, set()).add(future)
        self.woken.set()
        try:
            await asyncio.wait({future}, timeout=seconds)
        finally:
            others = self.waiting.get(number, set())
            others.discard(future)
            if not others:
                self.waiting.pop(number, None)

    async def acknowledge(self, up_to: int) -> None:
        if up_to > self._answered.until:
            await self._look()
        if up_to > self._answered.until:
            message = f"Invalid 'up_to': {up_to}. There are results up to command {self._answered.until}."
            raise ApiError(400, message, "result_missing", "up_to")
        async with self.acknowledging:
            if up_to <= self._acknowledged:
                return
            await asyncio.to_thread(results.acknowledge, self.results, up_to)
            for number in range(self._acknowledged + 1, up_to + 1):
                self.digests.pop(number, None)
                if place := self.places.pop(number, None):
                    self.bytes -= place.end - place.start
            self._acknowledged = up_to
            await asyncio.to_thread(results.drop, self.results, self._needed())

    def _needed(self) -> int:
        """Where the first result begins that somebody may ask for."""
        return min((place.start for place in self.places.values()), default=self.seen)

    async def _watch(self) -> None:
        """Look for results when there may be some, until the job has ended."""
        while not self.ended:
            try:
                async with asyncio.timeout(LOOK_SECONDS if self.waiting else None):
                    await self.woken.wait()
            except TimeoutError:
                pass
            self.woken.clear()  # before anything is read: what comes from now on wakes again
            try:
                await self._look()
            except Exception:  # too many open files, say: the next look may succeed
                log.exception("the results in %s cannot be read", self.results)
                await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        """Take note of the results that have come.

        Raises:
            ApiError: 500: they are damaged.
        """
        async with self.looking:
            ended = self.job().status in TERMINAL  # before the results: after the job's end there are no more
            with readable(self.job):
                found = await asyncio.to_thread(lambda: list(results.readable(self.results, self.seen)))
            for place in found:
                self.seen = place.end
                self._note(place)
        if ended and not self.ended:
            self.ended = True
            for number in list(self.waiting):
                self._wake(number)

    def _note(self, place: Place) -> None:
        if place.number in self._answered:  # the first one stands
            return
        self._answered.add(place.number)
        self.places[place.number] = place
        self.bytes += place.end - place.start
        self._wake(place.number)

    def _wake(self, number: int) -> None:
        for future in self.waiting.pop(number, ()):
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Look no more, and close the inbox; what is being written is written first."""
        self.watching.cancel()
        if self.writer:
            self.writer.close()
            self.writer = None


@contextlib.contextmanager
def readable(job: Callable[[], Job]) -> Iterator[None]:
    """What clients hear of damaged files inside the block: not where they are.

    Raises:
        ApiError: 500: one is damaged.
    """
    try:
        yield
    except LogDamagedError as error:
        job_id = job().id
        log.error("job %s: %s", job_id, error)
        message = f"The commands of job {job_id} or their results are damaged; the server's log says where."
        raise ApiError(500, message, "storage_damaged", headers=NO_RETRY) from None
