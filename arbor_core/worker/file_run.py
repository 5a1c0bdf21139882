"""What the function of a trainer that learns from a file is handed (`arbor_core.types.FileRun`)."""

from __future__ import annotations

from dataclasses import dataclass

from arbor_core.types import ArborError, ConfigT

from .run import WorkerRun


@dataclass
class FileWorkerRun(WorkerRun[ConfigT]):
    """A run with a training file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training_file = self.stored(self.document.training_file)
        if training_file is None:
            raise ArborError(f"{self.job_files.document} names no training file, and its trainer learns from one")
        self.training_file = training_file
        self.validation_file = self.stored(self.document.validation_file)
