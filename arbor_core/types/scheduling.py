"""What a scheduler sees and what it says."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from msgspec import Struct
from msgspec.structs import force_setattr

from .devices import Claim, pool_for


class QueuedJob(Struct, frozen=True):
    """A job that waits, as a scheduler sees it."""

    id: str
    claim: Claim
    seq: int
    """Order of arrival."""
    priority: int = 0
    """What its author gave it: higher is more urgent."""
    waited: int = 0
    """How many attempts of other jobs were started while it was queued."""


class RunningJob(Struct, frozen=True):
    """A job that holds devices, as a scheduler sees it."""

    id: str
    claim: Claim
    seq: int
    priority: int = 0
    waited: int = 0
    """As long as it waited before it was started."""
    stopping: bool = False
    """It is about to give its devices back."""
    nodes: tuple[str, ...] = ()
    """The node that each bundle of its claim is on; empty: all are on the server's own machine."""

    def held(self) -> Counter[tuple[str, str]]:
        """How many devices it holds, by pool and node."""
        held: Counter[tuple[str, str]] = Counter()
        for bundle, node in zip(self.claim.bundles, self.nodes or [""] * len(self.claim.bundles), strict=True):
            held[pool_for(bundle.role), node] += bundle.count
        return held


class Snapshot(Struct, frozen=True):
    """All that a scheduler may know."""

    queued: tuple[QueuedJob, ...]
    """Of a very long queue those that came first and those of the highest priority."""
    running: tuple[RunningJob, ...]
    free: dict[str, int]
    """Free devices by pool (`train`, `engine`), on all nodes together. A bundle of a claim fits on one node or not at
    all: what can start now depends on `free_by_node`."""
    free_by_node: dict[str, dict[str, int]] = {}
    """Free devices by pool and node; empty: all are on the server's own machine, which is ""."""

    def __post_init__(self) -> None:
        if not self.free_by_node:
            force_setattr(self, "free_by_node", {pool: {"": count} for pool, count in self.free.items()})

    def places(self) -> Counter[tuple[str, str]]:
        """Free devices by pool and node, for `arbor_core.placements`."""
        return Counter({(pool, node): n for pool, nodes in self.free_by_node.items() for node, n in nodes.items()})


class Plan(Struct, frozen=True):
    """What to do now: jobs to start, and running jobs that are to write a checkpoint and queue again, so that another
    can start later."""

    start: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()


class Scheduler(Protocol):
    def plan(self, snapshot: Snapshot) -> Plan:
        """Choose from the snapshot and nothing else: same snapshot, same plan."""
        ...
