"""Checkpoints: what TRL's trainer saves goes where the run says, when there is room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig
from trl.trainer.sft_trainer import SFTTrainer

from arbor_core import Run

from . import SftConfig

Numbers = Callable[[], dict[str, float]]


class SavingTrainer(SFTTrainer):
    """TRL's trainer. Rank 0 saves into the run's checkpoint itself, and does so again while the disk is full; the other
    ranks write their random states into the attempt's scratch directory, from where rank 0 links them.

    Where the ranks save together (FSDP, DeepSpeed), all of them write there and none can do it again alone.

    Args:
        numbers: The metrics of the step that is saved.
        options: `SFTTrainer`'s.
    """

    def __init__(self, run: Run[SftConfig], numbers: Numbers, **options: Any) -> None:
        super().__init__(**options)
        self.run, self.numbers = run, numbers
        self.folder: Path | None = None

    def store_flos(self) -> None:
        """Nobody reads how many operations there were, and a rank that saves again alone cannot add them up."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        name = f"checkpoint-{step}"  # what transformers makes of an output directory
        scratch = Path(str(self.args.output_dir)) / name
        alone = self.run.rank == 0 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not alone:
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        self.accelerator.wait_for_everyone()

        def write(folder: Path) -> None:
            self.folder = folder
            try:
                super(SavingTrainer, self)._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
            finally:
                self.folder = None
            take(folder / name, folder)
            shutil.rmtree(folder / name)
            take(scratch, folder)
            self.write_ends(folder)

        if alone:
            self.run.write_checkpoint(step, write, **self.numbers())
        elif self.run.rank == 0:
            with self.run.checkpoint(step, **self.numbers()) as folder:
                take(scratch, folder)
                self.write_ends(folder)
        if self.run.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)  # there is none with one rank

    def write_ends(self, folder: Path) -> None:
        """Say which tokens end an answer beside an adapter too; transformers does so for full weights only."""
        if self.run.config.lora:
            ends = self.accelerator.unwrap_model(self.model).generation_config.eos_token_id
            GenerationConfig(eos_token_id=ends).save_pretrained(folder)  # type: ignore[no-untyped-call]


def take(source: Path, folder: Path) -> None:
    """Link all files of a directory into another on the same disk, but for the pickle of arguments nobody reads."""
    if source.is_dir():
        ignored = shutil.ignore_patterns("training_args.bin")
        shutil.copytree(source, folder, copy_function=os.link, ignore=ignored, dirs_exist_ok=True)
