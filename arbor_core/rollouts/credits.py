"""Learning from rollouts, as the server sees it: which batches a client may send, and what it has sent.

A batch id is a credit for one group. A trainer that makes steps of `groups_per_step` groups and may be `max_staleness`
steps ahead of them has credits for `groups_per_step * (1 + max_staleness)` groups that are not handled yet. All of it
follows from the inbox and from what the trainer has handled, so a server that starts knows what an earlier one did.
"""

from __future__ import annotations

import asyncio
import errno
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from arbor_core.jobdir import inbox
from arbor_core.jobdir.inbox import Inbox
from arbor_core.process.wakeup import wake
from arbor_core.types import UNNUMBERED, Accepted, ApiError, Group, Policy, RolloutConfig

AHEAD = 1024
"""Batch ids may run ahead of what was offered by so many: of a server that ended before it could say which it had."""
REMEMBERED = 4096
"""Batch ids whose digests are kept, to tell a repeated request from another one of the same id. Of older ones it is
known that they are used, and no more."""
WAITING = 256
"""Groups that may wait beside those that there are credits for."""


@dataclass
class Offer:
    """A credit that no group has come for."""

    at: float
    version: int


@dataclass
class Sending:
    """A group that waits to be written."""

    group: Group
    digest: int
    offer: Offer | None = None
    """The credit that it used up, if it was one of those that are offered."""
    done: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Session:
    """The rollouts of one job.

    Args:
        folder: The job's inbox.
        config: The job's, as far as the server must know it.
    """

    def __init__(self, folder: Path, config: RolloutConfig) -> None:
        self.folder, self.config = folder, config
        self.inbox = Inbox(folder)
        self.filled: dict[int, tuple[int, int]] = {}
        """Digest and position of the groups of the latest batch ids."""
        self.used = Spans()
        """All batch ids that a group has come for."""
        self.offered: dict[int, Offer] = {}
        self.count = self.next_id = 0
        self.taking: dict[int, Sending] = {}
        self.queue: list[Sending] = []
        self.writing: asyncio.Task[None] | None = None
        for start, path in inbox.segments(folder):
            for offset, _, id, digest in inbox.headers(path):  # noqa: A001
                self._filled(id, digest, start + offset)

    def _filled(self, id: int, digest: int, start: int) -> None:
        self.count += 1
        if id == UNNUMBERED:
            return
        self.offered.pop(id, None)
        self.filled[id] = (digest, start)
        self.used.add(id)
        self.next_id = max(self.next_id, id + 1)
        if len(self.filled) > REMEMBERED:
            del self.filled[next(iter(self.filled))]  # the oldest

    def pending(self, policy: Policy) -> list[int]:
        """The batch ids that a group may be sent for now. One that nobody came for in `offer_seconds` is replaced."""
        now = time.monotonic()
        before = now - self.config.offer_seconds
        self.offered = {batch: offer for batch, offer in self.offered.items() if offer.at > before}
        window = self.config.groups_per_step * (1 + self.config.max_staleness)
        free = policy.handled + window - self.count - len(self.queue) - len(self.offered)
        for _ in range(free):
            while self.next_id in self.taking:  # it is one that an earlier server offered
                self.next_id += 1
            self.offered[self.next_id] = Offer(now, policy.version)
            self.next_id += 1
        return sorted(self.offered)

    def sampled_at(self, id: int, policy: Policy) -> int:
        """The oldest policy version that can have sampled a group which does not say: that of its credit."""
        offer = self.offered.get(id)
        return min(offer.version, policy.version) if offer else policy.version

    async def send(self, group: Group, digest: int, policy: Policy) -> Accepted:
        """Put a group into the inbox; it is on the disk when this returns. The same group again changes nothing.

        Args:
            group: Its batch id is a credit, or UNNUMBERED: it takes the lowest that is offered, if one is.
            digest: 64 bits that stand for what the client sent.

        Raises:
            ApiError: the batch id was used for another group or is none of this job's; too many groups wait.
            OSError: it could not be written.
        """
        pending = self.pending(policy)
        if group.id == UNNUMBERED and pending:
            group = msgspec.structs.replace(group, id=pending[0])
        elif group.id != UNNUMBERED and (known := await self.known(group.id, digest)):
            return known
        window = self.config.groups_per_step * (1 + self.config.max_staleness)
        if self.count + len(self.queue) - policy.handled >= window + WAITING:
            message = f"{self.count - policy.handled} groups wait to be trained on: wait for pending_batch_ids."
            raise ApiError(429, message, "rollouts_queue_full", headers={"retry-after": "1"})
        sending = Sending(group, digest, self.offered.pop(group.id, None))
        if group.id != UNNUMBERED:
            self.taking[group.id] = sending
        self.queue.append(sending)
        if self.writing is None:
            self.writing = asyncio.create_task(self._write())
        return Accepted(group.id, await asyncio.shield(sending.done))

    async def known(self, id: int, digest: int) -> Accepted | None:
        """What became of a batch that was sent before. None: it was not; a `send` that follows at once puts it in.

        Raises:
            ApiError: it was another one, or so long ago that nobody can tell; the id is none of ours.
        """
        if not 0 <= id < self.next_id + AHEAD:
            message = f"Batch id {id} was never offered: pending_batch_ids says which are."
            raise ApiError(400, message, "step_out_of_order", "batch_id")
        before = None
        if other := self.taking.get(id):
            before = (other.digest, await asyncio.shield(other.done))
        before = before or self.filled.get(id)
        if before is None and id not in self.used:
            return None
        if before is None or before[0] != digest:
            what = "another group" if before else "a group that came too long ago to tell whether it was this one"
            message = f"Batch id {id} was used for {what}: take one of pending_batch_ids."
            raise ApiError(400, message, "batch_id_reuse", "batch_id")
        return Accepted(id, before[1], repeated=True)

    async def _write(self) -> None:
        """Write what waits, several groups with one sync, until nothing waits."""
        while self.queue:
            batch = self.queue[:]
            try:
                begin = self.inbox.end
                ends = await asyncio.to_thread(self.inbox.append, [(one.group, one.digest) for one in batch])
                full = OSError(errno.ENOSPC, "the disk became full", str(self.folder))
                starts: Sequence[int | Exception] = [begin, *ends[:-1]] + [full] * (len(batch) - len(ends))
            except Exception as error:  # each sender hears it
                starts = [error] * len(batch)
            del self.queue[: len(batch)]
            self._settle(batch, starts)
            wake(self.folder / "bell", "")
        self.writing = None

    def _settle(self, batch: Sequence[Sending], starts: Sequence[int | Exception]) -> None:
        for one, start in zip(batch, starts, strict=True):
            self.taking.pop(one.group.id, None)
            if isinstance(start, Exception):
                if one.offer:
                    self.offered[one.group.id] = one.offer
                one.done.set_exception(start)
                one.done.exception()  # whoever waited may be gone
            else:
                self._filled(one.group.id, one.digest, start)
                one.done.set_result(start)

    def group(self, position: int) -> Group:
        """The group that begins there in the inbox."""
        return next(inbox.read(self.folder, position)).group

    def close(self) -> None:
        """Close the inbox; what is being written is written first."""
        if self.writing is None:
            self.inbox.close()
        else:
            self.writing.add_done_callback(lambda _: self.inbox.close())


class Spans:
    """Numbers from 0 on. A million in one row take as much memory as one does."""

    def __init__(self) -> None:
        self.edges: list[int] = []
        """The first number of a span and the one that follows its last, span by span, in order."""

    def __contains__(self, number: int) -> bool:
        return bisect_right(self.edges, number) % 2 == 1

    def add(self, number: int) -> None:
        """Take a number in; one that is there already changes nothing."""
        at = bisect_right(self.edges, number)
        if at % 2:
            return
        follows, precedes = self.edges[at - 1 : at] == [number], self.edges[at : at + 1] == [number + 1]
        self.edges[at - follows : at + precedes] = [number] * (not follows) + [number + 1] * (not precedes)
