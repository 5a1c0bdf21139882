"""The jobs that learn from rollouts while they run: their sessions and ledgers, opened when first asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

from arbor_core.jobdir import inbox
from arbor_core.jobs.policies import newest_policy
from arbor_core.jobs.records import Job
from arbor_core.jobs.states import VALIDATED
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

from .credits import Session
from .ledger import Ledger

log = logging.getLogger(__name__)


class _Named(msgspec.Struct):
    completions: tuple[str, ...] = ()


class Summary(msgspec.Struct):
    """A group, as far as it says which completions it was made of, and what it is called."""

    rollouts: tuple[_Named, ...]
    id: int = UNNUMBERED
    label: str | None = None


class Live:
    """One job's rollouts."""

    def __init__(self, store: Store, job: Job, root: Path) -> None:
        folder = root / "jobs" / job.id
        self.store, self.job_id = store, job.id
        self.config = msgspec.convert(job.spec.config, RolloutConfig)
        self.session = Session(folder / "inbox", self.config)
        self.ledger = Ledger(folder / "ledger")
        self.labels: dict[str, tuple[int, Accepted | asyncio.Future[Accepted]]] = {}
        """Digests of the groups that clients gave names, and what became of them or will."""
        for start, digest, group in summaries(folder / "inbox"):
            self.ledger.spend(*(reference(name) for rollout in group.rollouts for name in rollout.completions))
            if group.label is not None:
                self.labels[group.label] = (digest, Accepted(group.id, start))

    @property
    def policy(self) -> Policy:
        """What the trainer has published and handled."""
        return newest_policy(self.store, self.job_id)[0]

    @property
    def received(self) -> int:
        """How many groups have come."""
        return self.session.count

    def pending(self) -> list[int]:
        """The batch ids that a group may be sent for now."""
        return self.session.pending(self.policy)

    def sampled_at(self, batch_id: int) -> int:
        """The policy version of a group that does not say: that of its credit."""
        return self.session.sampled_at(batch_id, self.policy)

    async def known(self, batch_id: int, digest: int) -> Accepted | None:
        """What became of a group that was sent before under a batch id; see `Session.known`."""
        return await self.session.known(batch_id, digest)

    async def labelled(self, label: str, digest: int) -> Accepted | None:
        """What became of a group that was sent before under a name. None: it was not; a `send` that follows at once
        puts it in.

        Raises:
            ApiError: it was another one.
        """
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
        """Put a group into the inbox; see `Session.send`. The completions in it are spent from now on."""
        names = [reference(name) for rollout in group.rollouts for name in rollout.completions]
        self.ledger.spend(*names)  # before the first wait: a second group with one of them is refused meanwhile
        coming: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        if group.label is not None:
            self.labels[group.label] = (digest, coming)
        try:
            accepted = await self.session.send(group, digest, self.policy)
        except Exception as error:
            self.ledger.spent.difference_update(names)
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

    def group(self, accepted: Accepted) -> Group:
        """A group that was accepted."""
        return self.session.group(accepted.position)

    def completion(self, id: str, index: int = 0) -> Completion | None:
        """What was sampled under an id, if it is still known."""
        return self.ledger.get(id, index)

    def is_spent(self, id: str, index: int = 0) -> bool:
        """Whether a completion was rewarded already."""
        return (id, index) in self.ledger.spent

    def match(
        self, key: bytes, without: frozenset[tuple[str, int]] = frozenset(), tools: bytes | None = None
    ) -> Completion | None:
        """The newest completion with such messages and answer that is neither spent nor among `without`; see
        `Ledger.match`."""
        return self.ledger.match(key, without, tools)

    def close(self) -> None:
        self.session.close()
        self.ledger.close()


class LiveJobs:
    """The open sessions of a server."""

    def __init__(self, store: Store, root: Path) -> None:
        self.store, self.root = store, root
        self.open: dict[str, Live] = {}

    def settle(self) -> None:
        """Let trainers read all that is on the disk, before any client comes: after a power failure that may be more
        than they were told. To be called before any session is open."""
        sql = f"SELECT id FROM jobs WHERE {VALIDATED} AND json_extract(spec,'$.rollouts')"  # noqa: S608
        for row in self.store.read(sql):
            try:
                inbox.Inbox(self.root / "jobs" / row["id"] / "inbox").close()
            except (OSError, inbox.InboxDamagedError) as error:  # its trainer and its clients will hear of it
                log.warning("the inbox of job %s: %s", row["id"], error)

    def of(self, job: Job) -> Live | None:
        """A job's rollouts; None where there are none to come: it learns from a file, or has ended."""
        if job.status in TERMINAL or not job.spec.rollouts:
            if ended := self.open.pop(job.id, None):
                ended.close()
            return None
        if job.id not in self.open:
            self.open[job.id] = Live(self.store, job, self.root)
        return self.open[job.id]

    def close(self) -> None:
        for live in self.open.values():
            live.close()


def summaries(folder: Path) -> Iterator[tuple[int, int, Summary]]:
    """Position, digest and summary of each group in an inbox."""
    for first, path in inbox.segments(folder):
        content = path.read_bytes()
        for offset, length, _, digest in inbox.headers(path):
            begin = offset + inbox.HEADER_BYTES
            yield first + offset, digest, msgspec.msgpack.decode(content[begin : begin + length], type=Summary)
