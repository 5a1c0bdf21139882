"""A job has succeeded when its result answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sft_jobs import FULL, Job, chat, write_rows

from arbor_core import CheckpointEvent, CheckpointWithdrawn, ErrorEvent, ResultEvent
from arbor_core.jobdir import checkpoints

ROWS = [chat(f"q{n}", f"a{n}") for n in range(10)]
LORA = {**FULL, "lora": {"r": 4}}


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> Callable[..., Job]:
    def make(**hyperparameters: Any) -> Job:
        return Job(tmp_path / "job", tiny, write_rows(tmp_path / "rows.jsonl", ROWS), None, hyperparameters)

    return make


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_weights_that_are_no_numbers_are_no_result(job: Callable[..., Job], kind: dict[str, Any]) -> None:
    """The loss of the only step is finite; what the step makes of the weights is not."""
    made = job(**{**kind, "learning_rate": 1e38, "max_steps": 1, "weight_decay": 1e10})
    assert made.attempt() == 1
    error = made.event(ErrorEvent)
    assert error.code == "result_unusable"
    assert "finite" in error.message
    assert [event.dir for event in made.events(CheckpointEvent)] == ["1-1"]
    assert withdrawn(made) == ["1-1"]
    assert not made.events(ResultEvent)


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_weights_that_end_training_are_no_model(job: Callable[..., Job], kind: dict[str, Any]) -> None:
    """The loss is no number in the step after a checkpoint, for the weights in it are none."""
    made = job(**{**kind, "learning_rate": 1e38, "max_steps": 3, "weight_decay": 1e10, "checkpoint_steps": 1})
    assert made.attempt() == 1
    assert made.event(ErrorEvent).code == "training_diverged"
    assert withdrawn(made) == [event.dir for event in made.events(CheckpointEvent)] == ["1-1"]


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_what_is_opened_are_the_files(job: Callable[..., Job], kind: dict[str, Any]) -> None:
    """An attempt that finds the last step done looks at the files, whatever else there is in memory."""
    made = job(**kind, max_steps=1).run()
    folder = made.result()
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    name = next(iter(weights))
    weights[name][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    manifest = checkpoints.manifest(folder)
    assert manifest
    rewritten = checkpoints.Manifest(manifest.step, manifest.attempt, manifest.metrics, vouched(folder))
    (folder / checkpoints.MANIFEST).write_bytes(checkpoints.msgspec.json.encode(rewritten))
    assert made.attempt() == 1
    assert made.event(ErrorEvent).code == "result_unusable"
    assert withdrawn(made) == [folder.name]


def withdrawn(made: Job) -> list[str]:
    """Checkpoints that are not offered any more, and were set aside."""
    found = [event.dir for event in made.events(CheckpointWithdrawn)]
    assert sorted(path.name for path in checkpoints.aside(made.dir / "checkpoints")) == [f"{x}.damaged" for x in found]
    return found


def vouched(folder: Path) -> dict[str, checkpoints.FileEntry]:
    (folder / checkpoints.MANIFEST).unlink()
    return checkpoints.durable(folder)
