"""The rates of a job's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sft_jobs import FULL, Job, chat, write_rows

ROWS = [chat(f"q{n}", f"a{n}") for n in range(10)]
RATE = 1e-3


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> Any:
    def make(name: str, **hyperparameters: Any) -> Job:
        rows = write_rows(tmp_path / f"{name}.jsonl", ROWS)
        return Job(tmp_path / name, tiny, rows, None, {**FULL, "learning_rate": RATE, **hyperparameters})

    return make


def test_warmup_eats_all_steps(job: Any, tiny: Path) -> None:
    """One step, all of it warm-up: it has the highest rate, and something is learned."""
    made = job("one", max_steps=1, warmup_ratio=0.99).run()
    assert made.curve("learning_rate") == [RATE]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, made.result()))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("keys", "rates"),
    [
        ({"warmup_ratio": 0.5, "max_steps": 4}, [1 / 2, 1, 1, 1 / 2]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.75, "max_steps": 4}, [1 / 3, 2 / 3, 1, 1]),
        (
            {"lr_scheduler_type": "linear", "warmup_ratio": 0.5, "max_steps": 4, "training_version": 1},
            [0, 1 / 2, 1, 1 / 2],
        ),
    ],
    ids=["linear", "constant", "older"],
)
def test_rates(job: Any, keys: dict[str, Any], rates: list[float]) -> None:
    made = job("rates", **{"batch_size": 5, "n_epochs": 2, **keys}).run()
    assert made.curve("learning_rate") == pytest.approx([RATE * rate for rate in rates])
