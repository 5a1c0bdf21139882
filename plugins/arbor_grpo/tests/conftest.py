"""Fixtures: one tiny model for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the machine-learning libraries")

sys.path.insert(0, str(Path(__file__).parent))  # grpo_jobs.py, whatever the import mode

import torch
from grpo_jobs import Job
from transformers import Qwen2Config, Qwen2ForCausalLM


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that read bytes, with weights large enough to have opinions."""
    from arbor_sft.tiny import tokenizer

    path = tmp_path_factory.mktemp("models") / "tiny"
    words = tokenizer(256)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Callable[..., Job]:
    """`job("name", max_steps=3)` makes a job's directory."""

    def make(name: str = "job", adapter: Path | None = None, **hyperparameters: Any) -> Job:
        keys = {"dtype": "float32", **hyperparameters}  # so that a GPU computes what the reference does
        return Job(tmp_path / name, "grpo", [], str(tiny), keys, adapter=adapter)

    return make
