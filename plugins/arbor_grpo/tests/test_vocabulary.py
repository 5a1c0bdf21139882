"""Tokenizers with tokens that the model's embedding has no row for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpo_jobs import FULL, QUICK, Job, group, rollout
from transformers import AutoModelForCausalLM, AutoTokenizer

from arbor_core.types import ErrorEvent, Group, MessageEvent, ResultEvent


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Callable[..., Job]:
    def make(token: dict[str, Any], replacing: str = "", by: str = "") -> Job:
        model = tmp_path / "larger"
        shutil.copytree(tiny, model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_special_tokens(token)
        tokenizer.chat_template = tokenizer.chat_template.replace(replacing, by)
        tokenizer.save_pretrained(model)
        return Job(tmp_path / "job", "grpo", [], str(model), {**QUICK, **FULL, "dtype": "float32", "max_steps": 1})

    return make


def test_ids_beyond_the_embedding_are_not_padded_with(job: Callable[..., Job]) -> None:
    made = job({"pad_token": "[PAD]"}, "", "")
    made.send(group(1), group(2))
    made.must()
    assert [event.message for event in made.events(MessageEvent) if event.level == "warn"] == []
    (result,) = made.events(ResultEvent)
    for folder in (made.dir / "checkpoints" / str(result.dir), next((made.dir / "weights").glob("1-*"))):
        AutoModelForCausalLM.from_pretrained(folder)


def test_ids_beyond_the_embedding_in_the_template(job: Callable[..., Job]) -> None:
    made = job({"additional_special_tokens": ["<|begin|>"]}, "<|im_start|>", "<|begin|>")
    assert made.run() == 1
    (error,) = made.events(ErrorEvent)
    assert error.code == "model_unavailable"
    assert all(part in error.message for part in ("'<|begin|>'", "that has 263", "its tokenizer 264"))


def test_ids_beyond_the_embedding_in_a_group_of_tokens(job: Callable[..., Job]) -> None:
    made = job({"additional_special_tokens": ["<|begin|>"]})
    bad = Group(id=3, rollouts=tuple(rollout(n, [1, 2], [3, 263], float(n)) for n in range(2)), version=0)
    made.send(bad, group(1), group(2))
    made.must()
    (warning,) = [event for event in made.events(MessageEvent) if event.level == "warn"]
    assert "rollout 0: token 263 ('<|begin|>') has no row" in warning.message
