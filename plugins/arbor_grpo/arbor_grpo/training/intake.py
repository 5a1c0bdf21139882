"""From the inbox to the groups of a step: which are used, which are skipped. A pure function of the inbox's order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from arbor_core import Record, StepInputs

from .rows import GroupRows, Reader, RejectedError


@dataclass
class StepGroups:
    """The groups of the next step, so far.

    Args:
        position: Where in the inbox to go on.
        step: Optimizer steps done: how old a group is depends on it.
        iterations: Optimizer steps on each batch.
    """

    position: int
    step: int
    iterations: int = 1
    used: list[tuple[Record, GroupRows]] = field(default_factory=list)
    stale: list[Record] = field(default_factory=list)
    rejected: list[tuple[Record, str]] = field(default_factory=list)

    @property
    def handled(self) -> int:
        """Groups that were looked at."""
        return len(self.used) + len(self.stale) + len(self.rejected)

    @property
    def skipped(self) -> int:
        """Groups that were skipped."""
        return len(self.stale) + len(self.rejected)

    @property
    def ages(self) -> list[int]:
        """In batches, of the groups that are used."""
        return [self.age(record) for record, _ in self.used]

    def age(self, record: Record) -> int:
        """How many batches the policy has learned from since the group was sampled: the unit of credits."""
        return max(0, self.step - record.group.version) // self.iterations

    @property
    def inputs(self) -> StepInputs:
        """What the step is made of."""
        skipped = sorted([r.start for r in self.stale] + [r.start for r, _ in self.rejected])
        return StepInputs(self.position, tuple((r.start, r.crc) for r, _ in self.used), tuple(skipped))

    def take(self, records: Iterable[Record], reader: Reader) -> bool:
        """Use records until there are enough for a step; whether there are."""
        config = reader.config
        for record in records:
            if len(self.used) == config.groups_per_step:
                break
            self.position = record.end
            if self.age(record) > config.oldest:
                self.stale.append(record)
                continue
            try:
                self.used.append((record, reader.read(record.group)))
            except RejectedError as error:
                self.rejected.append((record, str(error)))
        return len(self.used) == config.groups_per_step
