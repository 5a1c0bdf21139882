"""The server's side of a job that learns from rollouts while it runs (`arbor_core.types.RolloutSession`).

A session brings together the job's credits, its inbox and the ledger of what its model has sampled. `OpenSessions` are
those of a server, each opened when it is first needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from arbor_core.config.convert import renamed
from arbor_core.jobdir import groups, inbox
from arbor_core.jobdir.inbox_writer import InboxWriter, Sending
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.policies import newest_policy
from arbor_core.jobs.records import Job
from arbor_core.jobs.states import LIVE, VALIDATED
from arbor_core.storage.database import Store
from arbor_core.types import (
    TERMINAL,
    UNNUMBERED,
    Accepted,
    ApiError,
    Completion,
    Group,
    Policy,
    RolloutConfig,
    reference,
)

from .completion_ledger import Ledger
from .credits import Credits

log = logging.getLogger(__name__)


class Session:
    """One job's rollouts.

    Args:
        folder: The job's directory.
        config: The job's, as far as the server must know it.
        policy: Reads what the trainer has published and handled.
    """

    def __init__(self, folder: JobDir, config: RolloutConfig, policy: Callable[[], Policy]) -> None:
        """Read the inbox and the ledger: a long one takes seconds, and may be opened in any thread.

        Raises:
            OSError: the job's directory cannot be written.
            InboxDamagedError: a record is not what was written.
        """
        self.folder, self.config, self._policy = folder.inbox, config, policy
        self.credits, self.closed = Credits(config), False
        self.writer = InboxWriter(folder, self._settle)
        self.sending: dict[int, Sending] = {}
        """Groups that are being written, by batch id."""
        self.ledger = Ledger(folder.ledger)
        self.labels: dict[str, tuple[int, Accepted | asyncio.Future[Accepted]]] = {}
        """Digests of the groups that clients gave names, and what became of them or will."""
        for position, digest, group in summaries(self.folder):
            self.credits.receive(group.id, digest, position)
            self.ledger.spend(*(reference(name) for rollout in group.rollouts for name in rollout.completions))
            if group.label is not None:
                self.labels[group.label] = (digest, Accepted(group.id, position))

    @property
    def policy(self) -> Policy:
        return self._policy()

    @property
    def received(self) -> int:
        return self.credits.received

    def pending(self) -> list[int]:
        return self.credits.pending(self.policy)

    def sampled_at(self, batch_id: int) -> int:
        return self.credits.sampled_at(batch_id, self.policy)

    async def known(self, batch_id: int, digest: int) -> Accepted | None:
        self.credits.check_id(batch_id)
        if sending := self.sending.get(batch_id):
            earlier: tuple[int, int] | None = (sending.entry.digest, await asyncio.shield(sending.position))
        else:
            earlier = self.credits.latest.get(batch_id)
        if earlier is None and batch_id not in self.credits.used:
            return None
        if earlier is None or earlier[0] != digest:
            what = "another group" if earlier else "a group that came too long ago to tell whether it was this one"
            message = f"Batch id {batch_id} was used for {what}: take one of pending_batch_ids."
            raise ApiError(400, message, "batch_id_reuse", "batch_id")
        return Accepted(batch_id, earlier[1], repeated=True)

    async def labelled(self, label: str, digest: int) -> Accepted | None:
        if label not in self.labels:
            return None
        before, accepted = self.labels[label]
        if before != digest:
            message = f"The name '{label[:80]}' was used for another group: give each group a name of its own."
            raise ApiError(400, message, "group_reuse", "group")
        if isinstance(accepted, asyncio.Future):
            accepted = await asyncio.shield(accepted)
        return msgspec.structs.replace(accepted, repeated=True)

    async def send(self, group: Group, digest: int) -> Accepted:
        if self.closed:
            raise ApiError(400, "The job takes no rollouts: it has ended.", "invalid_job_state", "job_id")
        names = [reference(name) for rollout in group.rollouts for name in rollout.completions]
        self.ledger.spend(*names)  # before the first wait: a second group with one of them is refused meanwhile
        coming: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        if group.label is not None:
            self.labels[group.label] = (digest, coming)
        try:
            accepted = await self._put(group, digest)
        except Exception as error:
            self.ledger.unspend(*names)
            if group.label is not None:
                del self.labels[group.label]
            coming.set_exception(error)
            coming.exception()  # perhaps nobody waits for it
            raise
        except asyncio.CancelledError:  # the server ends: the next one knows what was written
            coming.cancel()
            raise
        coming.set_result(accepted)
        return accepted

    async def _put(self, group: Group, digest: int) -> Accepted:
        """Put a group into the inbox, under the lowest id that is offered if it has none."""
        policy = self.policy
        pending = self.credits.pending(policy)
        if group.id == UNNUMBERED and pending:
            group = msgspec.structs.replace(group, id=pending[0])
        elif group.id != UNNUMBERED and (known := await self.known(group.id, digest)):
            return known
        self.credits.reserve(group.id, policy)
        sending = self.writer.send(groups.entry(group, digest))
        if group.id != UNNUMBERED:
            self.sending[group.id] = sending
        return Accepted(group.id, await asyncio.shield(sending.position))

    def _settle(self, sending: Sending, position: int | Exception) -> None:
        batch_id, digest, _ = sending.entry
        self.sending.pop(batch_id, None)
        if isinstance(position, Exception):
            self.credits.release(batch_id)
        else:
            self.credits.settle(batch_id, digest, position)

    def group(self, accepted: Accepted) -> Group:
        return next(groups.read(self.folder, accepted.position)).group

    def completion(self, id: str, index: int = 0) -> Completion | None:
        return self.ledger.get(id, index)

    def is_spent(self, id: str, index: int = 0) -> bool:
        return (id, index) in self.ledger.spent

    def match(
        self, key: bytes, without: frozenset[tuple[str, int]] = frozenset(), tools: bytes | None = None
    ) -> Completion | None:
        return self.ledger.match(key, without, tools)

    def close(self) -> None:
        """Close the files; what is being written is written first, and nothing else is taken."""
        self.closed = True
        self.writer.close()
        self.ledger.close()


class OpenSessions:
    """The sessions of a server, each opened in a thread when it is first needed. `root`: the storage directory."""

    def __init__(self, store: Store, root: Path) -> None:
        self.store, self.root = store, root
        self.by_job: dict[str, asyncio.Task[Session]] = {}

    def recover(self) -> None:
        """Let trainers read all that is on the disk: after a power failure that may be more than they were told.
        To be called before any session is open."""
        sql = f"SELECT id FROM jobs WHERE {VALIDATED} AND {LIVE}"  # noqa: S608
        for row in self.store.read(sql):
            try:
                inbox.Inbox(JobDir.of(self.root, row["id"]).inbox).close()
            except (OSError, inbox.InboxDamagedError) as error:  # its trainer and its clients will hear of it
                log.warning("the inbox of job %s: %s", row["id"], error)

    async def of(self, job: Job) -> Session | None:
        """A job's session; None where there are no rollouts to come: it learns from a file, or has ended.

        Raises:
            OSError: the job's directory cannot be written.
            InboxDamagedError: a record in the inbox is not what was written.
        """
        if job.status in TERMINAL or job.spec.input != "rollouts":
            self.end(job.id)
            return None
        if job.id not in self.by_job:
            self.by_job[job.id] = asyncio.create_task(self._opened(job))
        opening = self.by_job[job.id]
        waits = not opening.done()
        try:
            session = await asyncio.shield(opening)
        except Exception:
            if self.by_job.get(job.id) is opening:
                del self.by_job[job.id]  # the next one tries again
            raise
        if waits and self._has_ended(job.id):
            self.end(job.id)
            return None
        return session

    async def _opened(self, job: Job) -> Session:
        config = msgspec.convert(renamed(job.spec.config, RolloutConfig)[0], RolloutConfig)
        folder = JobDir.of(self.root, job.id)
        return await asyncio.to_thread(Session, folder, config, lambda: newest_policy(self.store, job.id)[0])

    def _has_ended(self, job_id: str) -> bool:
        row = self.store.one("SELECT status FROM jobs WHERE id=?", job_id)
        return row is None or row["status"] in TERMINAL

    def end(self, job_id: str) -> None:
        """Close the session of a job that has ended; one that is still being opened is closed after that."""
        if opening := self.by_job.pop(job_id, None):
            if opening.done():
                close(opening)
            else:
                opening.add_done_callback(close)

    def close(self) -> None:
        for job_id in list(self.by_job):
            self.end(job_id)


def close(opening: asyncio.Task[Session]) -> None:
    """Close a session, if it could be opened."""
    if not opening.cancelled() and not opening.exception():
        opening.result().close()


class RolloutSummary(msgspec.Struct):
    completions: tuple[str, ...] = ()


class Summary(msgspec.Struct):
    """A group in the inbox, as far as a session must know it: which completions it used, and what it is called."""

    rollouts: tuple[RolloutSummary, ...]
    id: int = UNNUMBERED
    label: str | None = None


def summaries(folder: Path) -> Iterator[tuple[int, int, Summary]]:
    """Position, digest and summary of each group in an inbox."""
    for first, path in inbox.segments(folder):
        content = path.read_bytes()
        for offset, length, _, digest in inbox.headers(path):
            begin = offset + inbox.HEADER_BYTES
            yield first + offset, digest, msgspec.msgpack.decode(content[begin : begin + length], type=Summary)
