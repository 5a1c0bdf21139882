"""What the function of a trainer that learns from rollouts is handed (`arbor_core.types.RolloutRun`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from arbor_core.jobdir.documents import read_desired
from arbor_core.jobdir.samples import sampled
from arbor_core.types import (
    CheckpointRequest,
    ConfigT,
    Desired,
    GroupsSkipped,
    PolicyWeights,
    Record,
    Scored,
    StepInputs,
)

from .inbox_reader import CatchingUp, Feed
from .live_run import LiveWorkerRun


@dataclass
class RolloutWorkerRun(LiveWorkerRun[ConfigT]):
    """A run with an inbox of groups."""

    feed: Feed | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.catching_up = CatchingUp(self.job_files.inbox, self.order.handled)

    def metrics(
        self, step: int, total_steps: int, digest: str | None = None, fed: StepInputs | None = None, /, **values: float
    ) -> None:
        self.report_step(step, total_steps, digest, fed, values)

    def groups(self, position: int, wait: float) -> list[Record]:
        self.feed = self.feed or Feed(self.job_files.inbox)
        self.heartbeat.beat()  # ready, though nobody may send anything for days
        until = None
        if not self.catching_up.done and read_desired(self.job_files) == "finish":
            until = self.catching_up.end
            wait = wait if position < until else 0
        found = self.feed.take(position, wait, until)
        self.catching_up.done |= not found
        return found

    @contextmanager
    def publish(self, version: int, handled: int) -> Iterator[Path]:
        with self.publishing(version, handled) as folder:
            yield folder
        self.catching_up.handled(handled)

    def send_policy(self, version: int, handled: int, weights: PolicyWeights) -> None:
        self.sending(version, handled, weights)
        self.catching_up.handled(handled)

    def report_skipped(self, handled: int) -> None:
        self.emit(GroupsSkipped(f"{handled} groups handled", handled=handled))
        self.catching_up.handled(handled)

    def report_samples(
        self,
        record: Record,
        step: int | None = None,
        scored: Sequence[Scored] = (),
        decode: Callable[[list[int]], str] | None = None,
        error: str | None = None,
    ) -> None:
        if self.rank == 0:
            self.keep_samples(lambda: sampled(record, step, scored, decode, error))

    def asked_checkpoints(self) -> list[CheckpointRequest]:
        return super().asked_checkpoints() if self.catching_up.done else []  # clients have been answered a newer policy

    def desired(self) -> Desired:
        wanted = super().desired()
        return "run" if wanted == "finish" and not self.catching_up.done else wanted
