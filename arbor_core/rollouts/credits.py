"""Which batch ids the clients of a job may use: each is a credit for one group of rollouts.

A trainer that makes steps of `groups_per_step` groups and may be `max_staleness` steps ahead of them has credits for
`groups_per_step * (1 + max_staleness)` groups that are not handled yet. All of it follows from the groups in the inbox
and from what the trainer has handled, so a server that starts knows what an earlier one did.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass

from arbor_core.types import UNNUMBERED, ApiError, Policy, RolloutConfig

AHEAD = 1024
"""How far a batch id may be above those that this server has offered: an earlier server may have offered it and ended
before it received a group for it."""
REMEMBERED = 4096
"""Batch ids whose digests are kept, to tell a repeated request from another one with the same id. Older ones are only
known to be used."""
WAITING = 256
"""Groups without a credit that may wait besides those with one."""


@dataclass
class Offer:
    """A credit that no group has come for."""

    at: float
    """When it was offered, by `time.monotonic`."""
    version: int
    """The policy version then."""


class Credits:
    """The credits of one job. A group that comes for one is first reserved, then received or released."""

    def __init__(self, config: RolloutConfig) -> None:
        self.window = config.groups_per_step * (1 + config.max_staleness)
        self.offer_seconds = config.offer_seconds
        self.received = 0
        """Groups in the inbox."""
        self.in_flight = 0
        """Groups that are being written."""
        self.next_id = 0
        self.offered: dict[int, Offer] = {}
        self.reserved: dict[int, Offer | None] = {}
        """Batch ids of the groups that are being written, and their offers if this server made them."""
        self.latest: dict[int, tuple[int, int]] = {}
        """Digest and position in the inbox of the groups of the latest batch ids."""
        self.used = Spans()
        """All batch ids that a group has come for."""

    def pending(self, policy: Policy) -> list[int]:
        """The batch ids that a group may be sent for now. An offer that no group came for in `offer_seconds` is
        replaced by another one."""
        now = time.monotonic()
        oldest = now - self.offer_seconds
        self.offered = {batch: offer for batch, offer in self.offered.items() if offer.at > oldest}
        free = policy.handled + self.window - self.received - self.in_flight - len(self.offered)
        for _ in range(free):
            while self.next_id in self.reserved:  # an earlier server offered it
                self.next_id += 1
            self.offered[self.next_id] = Offer(now, policy.version)
            self.next_id += 1
        return sorted(self.offered)

    def sampled_at(self, batch_id: int, policy: Policy) -> int:
        """The oldest policy version that can have sampled a group which does not say: that of its credit."""
        offer = self.offered.get(batch_id)
        return min(offer.version, policy.version) if offer else policy.version

    def check_id(self, batch_id: int) -> None:
        """Refuse an id that cannot have been offered.

        Raises:
            ApiError: 400.
        """
        if not 0 <= batch_id < self.next_id + AHEAD:
            message = f"Batch id {batch_id} was never offered: pending_batch_ids says which are."
            raise ApiError(400, message, "step_out_of_order", "batch_id")

    def reserve(self, batch_id: int, policy: Policy) -> None:
        """Take a credit (or none, if the id is UNNUMBERED) for a group that is about to be written.

        Raises:
            ApiError: 429: too many groups wait.
        """
        if self.received + self.in_flight - policy.handled >= self.window + WAITING:
            message = f"{self.received - policy.handled} groups wait to be trained on: wait for pending_batch_ids."
            raise ApiError(429, message, "rollouts_queue_full", headers={"retry-after": "1"})
        self.in_flight += 1
        if batch_id != UNNUMBERED:
            self.reserved[batch_id] = self.offered.pop(batch_id, None)

    def release(self, batch_id: int) -> None:
        """Give back the credit of a reserved group that could not be written."""
        self.in_flight -= 1
        if offer := self.reserved.pop(batch_id, None):
            self.offered[batch_id] = offer

    def settle(self, batch_id: int, digest: int, position: int) -> None:
        """Use up the credit of a reserved group that was written."""
        self.in_flight -= 1
        self.reserved.pop(batch_id, None)
        self.receive(batch_id, digest, position)

    def receive(self, batch_id: int, digest: int, position: int) -> None:
        """Count a group that is in the inbox."""
        self.received += 1
        if batch_id == UNNUMBERED:
            return
        self.offered.pop(batch_id, None)
        self.latest[batch_id] = (digest, position)
        self.used.add(batch_id)
        self.next_id = max(self.next_id, batch_id + 1)
        if len(self.latest) > REMEMBERED:
            del self.latest[next(iter(self.latest))]  # the oldest


class Spans:
    """A set of numbers from 0 on. A million consecutive ones take as much memory as one does."""

    def __init__(self) -> None:
        self.edges: list[int] = []
        """The first number of a span and the one that follows its last, span by span, in order."""

    def __contains__(self, number: int) -> bool:
        return bisect_right(self.edges, number) % 2 == 1

    def add(self, number: int) -> None:
        """Add a number; one that is there already changes nothing."""
        at = bisect_right(self.edges, number)
        if at % 2:
            return
        follows, precedes = self.edges[at - 1 : at] == [number], self.edges[at : at + 1] == [number + 1]
        self.edges[at - follows : at + precedes] = [number] * (not follows) + [number + 1] * (not precedes)
