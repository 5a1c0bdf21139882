"""The scheduler `fifo`: first come, first served."""

from __future__ import annotations

from .types import Claim, Plan, Snapshot


class FifoScheduler:
    """Starts jobs in the order of arrival.

    A job that does not fit holds back those behind it, so a large job is never starved by small ones.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        free = dict(snapshot.free)
        start: list[str] = []
        for job in sorted(snapshot.queued, key=lambda job: job.seq):
            wanted = needs(job.claim)
            if any(count > free.get(pool, 0) for pool, count in wanted.items()):
                break
            for pool, count in wanted.items():
                free[pool] -= count
            start.append(job.id)
        return Plan(start=tuple(start))


def needs(claim: Claim) -> dict[str, int]:
    """How many devices of each pool a claim takes."""
    counts: dict[str, int] = {}
    for bundle in claim.bundles:
        pool = bundle.role.partition(":")[0]
        counts[pool] = counts.get(pool, 0) + bundle.count
    return counts
