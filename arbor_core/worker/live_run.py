"""What the functions of all trainers are handed that learn from what clients send while they run
(`arbor_core.types.LiveRun`): checkpoints by name, and policies that engines serve meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arbor_core.crash_points import crash_point
from arbor_core.jobdir.checkpoint_requests import answered, asked
from arbor_core.jobdir.documents import import_object
from arbor_core.jobdir.weights import publishing
from arbor_core.types import CheckpointRequest, ConfigT, PolicyPublished, PolicyWeights, Sender

from .run import WorkerRun


@dataclass
class LiveWorkerRun(WorkerRun[ConfigT]):
    """A run with an inbox, of whatever kind."""

    sender: Sender | None = field(init=False, default=None)
    """Brings policies into engines; made when there is one to be sent otherwise than as files."""

    def asked_checkpoints(self) -> list[CheckpointRequest]:
        return asked(self.job_files)

    def name_checkpoint(self, request: CheckpointRequest, step: int) -> None:
        self.give_name(request.name, step, request.metadata)
        answered(self.job_files, request)
        crash_point("name_checkpoint.answered")

    @contextmanager
    def publishing(self, version: int, handled: int) -> Iterator[Path]:
        """Commit a policy that is written into the folder, and report it."""
        name = f"{version}-{self.attempt}"
        with publishing(self.job_files.weights, name) as folder:
            yield folder
        self._published(version, handled)

    def sending(self, version: int, handled: int, weights: PolicyWeights) -> None:
        """Send a policy in the way that its engines want, and report it."""
        if self.order.sender:
            self.sender = self.sender or import_object(self.order.sender)(self)
            sent = self.sender.send(version, weights)
            crash_point("weights.sent")
            self._published(version, handled, dict(sent))
        elif self.rank == 0:
            with self.publishing(version, handled) as folder:
                weights.write(folder)
        else:
            weights.write(None)

    def _published(self, version: int, handled: int, sent: dict[str, Any] | None = None) -> None:
        name, text = f"{version}-{self.attempt}", f"Policy version {version} published"
        self.emit(PolicyPublished(text, version=version, handled=handled, dir=name, sent=sent))
