"""What a scheduler sees and what it says."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from .devices import Claim


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


class Snapshot(Struct, frozen=True):
    """All that a scheduler may know."""

    queued: tuple[QueuedJob, ...]
    """Of a very long queue those that came first and those of the highest priority."""
    running: tuple[RunningJob, ...]
    free: dict[str, int]
    """Free devices by pool (`train`, `engine`)."""


class Plan(Struct, frozen=True):
    """What to do now: jobs to start, and running jobs that are to write a checkpoint and queue again, so that another
    can start later."""

    start: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()


class Scheduler(Protocol):
    def plan(self, snapshot: Snapshot) -> Plan:
        """Choose from the snapshot and nothing else: same snapshot, same plan."""
        ...
