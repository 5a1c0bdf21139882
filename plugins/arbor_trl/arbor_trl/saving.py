"""Checkpoints: what transformers' trainer saves goes where the run says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from arbor_core import ResumeClock, Run

from .model import write_end_tokens


class CheckpointMixin:
    """To stand before a trainer of TRL among the bases of a class: its checkpoints become the run's.

    Rank 0 saves into the run's checkpoint itself, and does so again while the disk is full; the other ranks write their
    random states into the attempt's scratch directory, from where rank 0 links them.

    Where the ranks save together (FSDP, DeepSpeed), all of them write there and none can do it again alone.
    """

    run: Run[Any]
    folder: Path | None = None
    resume_only = False
    """What is written is a resume point."""
    saved_step = -1
    """The step whose checkpoint or resume point was written last."""

    @cached_property
    def resume_clock(self) -> ResumeClock:
        return ResumeClock(self.run.config.resume_seconds)

    def save_resume_point(self) -> None:
        """Write what training can go on from after the present step; every rank calls it."""
        self.resume_only = True
        try:
            self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        finally:
            self.resume_only = False

    def checkpoint_metrics(self) -> Mapping[str, float]:
        """The metrics of the step that is saved."""
        return {}

    def checkpoint_files(self) -> Mapping[str, bytes]:
        """More files of a checkpoint, by name."""
        return {}

    def store_flos(self) -> None:
        """Count no operations: transformers would add them up over all ranks, who do not save at the same time."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder or self.args.output_dir)  # type: ignore[attr-defined]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Leave out TRL's frozen copy of the adapter that training began with. PEFT saves it in a folder of its own,
        and transformers, which resumes from such folders if there are any, would load nothing but that copy. A resumed
        run makes that copy again from the adapter that it starts from."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        trainer: Any = self
        for name in getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}):
            if name != "default" and output_dir:
                shutil.rmtree(Path(output_dir) / name, ignore_errors=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint of the present step; every rank calls it."""
        with self.resume_clock.writing():
            self._write_checkpoint(model, trial)
        self.saved_step = self.state.global_step  # type: ignore[attr-defined]

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        step = trainer.state.global_step
        name = f"checkpoint-{step}"  # transformers' name for it in an output directory
        scratch = Path(str(trainer.args.output_dir)) / name
        alone = self.run.rank == 0 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        if not alone:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer.accelerator.wait_for_everyone()

        def write(folder: Path) -> None:
            self.folder = folder
            try:
                super(CheckpointMixin, self)._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self.folder = None
            take(folder / name, folder)
            shutil.rmtree(folder / name)
            self._complete(folder, scratch)

        if self.resume_only:
            if self.run.rank == 0:
                fill = write if alone else lambda folder: self._complete(folder, scratch)
                self.run.write_resume_point(step, fill, **self.checkpoint_metrics())
        elif alone:
            self.run.write_checkpoint(step, write, **self.checkpoint_metrics())
        elif self.run.rank == 0:
            with self.run.checkpoint(step, **self.checkpoint_metrics()) as folder:
                self._complete(folder, scratch)
        if self.run.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)  # there is none with one rank

    def _complete(self, folder: Path, scratch: Path) -> None:
        """Put beside what rank 0 saved what the others did, and what transformers does not know of."""
        take(scratch, folder)
        for path, content in self.checkpoint_files().items():
            (folder / path).write_bytes(content)
        if self.run.config.lora:
            trainer: Any = self
            write_end_tokens(trainer.accelerator.unwrap_model(trainer.model), folder)


def take(source: Path, folder: Path) -> None:
    """Link all files of a directory into another on the same disk, but for the pickle of arguments nobody reads."""
    if source.is_dir():
        ignored = shutil.ignore_patterns("training_args.bin")
        shutil.copytree(source, folder, copy_function=os.link, ignore=ignored, dirs_exist_ok=True)
