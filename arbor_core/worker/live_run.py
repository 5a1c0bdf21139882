"""What the functions of all trainers are handed that learn from what clients send while they run
(`arbor_core.types.LiveRun`): checkpoints by name, and policies that engines serve meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arbor_core.crash_points import crash_point
from arbor_core.jobdir import checkpoints
from arbor_core.jobdir.checkpoint_requests import answered, asked
from arbor_core.jobdir.weights import publishing
from arbor_core.types import CheckpointEvent, CheckpointRequest, ConfigT, PolicyPublished

from .run import WorkerRun


@dataclass
class LiveWorkerRun(WorkerRun[ConfigT]):
    """A run with an inbox, of whatever kind."""

    def asked_checkpoints(self) -> list[CheckpointRequest]:
        return asked(self.job_files)

    def name_checkpoint(self, request: CheckpointRequest, step: int) -> None:
        folder = checkpoints.give_name(self.checkpoints_dir, request.name, step)
        crash_point("name_checkpoint.linked")
        said = checkpoints.manifest(folder)
        named = CheckpointEvent(
            f"Checkpoint '{request.name}' is that of step {step}",
            step=step,
            dir=folder.name,
            metrics=said.metrics if said else {},
            name=request.name,
            metadata=request.metadata,
        )
        self.emit(named)
        crash_point("name_checkpoint.told")
        answered(self.job_files, request.name)
        crash_point("name_checkpoint.answered")

    @contextmanager
    def publishing(self, version: int, handled: int) -> Iterator[Path]:
        """Commit a policy that is written into the folder, and report it."""
        name = f"{version}-{self.attempt}"
        with publishing(self.job_files.weights, name) as folder:
            yield folder
        self.emit(PolicyPublished(f"Policy version {version} published", version=version, handled=handled, dir=name))
