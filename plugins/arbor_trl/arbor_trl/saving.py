"""Checkpoints: what transformers' trainer saves goes where the run says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from transformers import GenerationConfig

from arbor_core import Run


class Saver(Protocol):
    """What of transformers' trainer is needed."""

    accelerator: Accelerator
    model: Any
    args: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None: ...


def save(run: Run[Any], trainer: Saver, metrics: Mapping[str, float], files: Mapping[str, bytes]) -> None:
    """Write a checkpoint of the trainer's present step: model, optimizer, scheduler and random states. Every rank
    calls it. The trainer writes on the disk of the checkpoints, so nothing is copied.

    Args:
        metrics: Of the step.
        files: More files, by name.
    """
    trainer._save_checkpoint(trainer.model, None)
    trainer.accelerator.wait_for_everyone()  # each rank writes its random state
    step = trainer.state.global_step
    written = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
    if run.rank != 0:
        return
    with run.checkpoint(step, **metrics) as folder:
        take(written, folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if run.config.lora:
            write_ends(trainer.accelerator.unwrap_model(trainer.model), folder)
    shutil.rmtree(written)


def take(source: Path, folder: Path) -> None:
    """Link all files of a directory into another on the same disk, but for the pickle of arguments nobody reads."""
    ignored = shutil.ignore_patterns("training_args.bin")
    shutil.copytree(source, folder, copy_function=os.link, ignore=ignored, dirs_exist_ok=True)


def write_ends(model: Any, folder: Path) -> None:
    """Say which tokens end an answer beside an adapter too; transformers does so for full weights only."""
    ends = model.generation_config.eos_token_id
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)  # type: ignore[no-untyped-call]
