"""Tokenizers with tokens that the model's embedding has no row for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sft_jobs import FULL, Job, chat, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from arbor_core import ErrorEvent, MetricsEvent

ROWS = [chat("q" + " x" * n, "a") for n in range(12)]
SIZES = ("that has 263", "its tokenizer 264")


@pytest.fixture(scope="session")
def larger(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`larger("padout", {"pad_token": "[PAD]"})`: the tiny model with one token more than its embedding has rows."""
    root = tmp_path_factory.mktemp("larger")

    def make(name: str, token: dict[str, Any], replacing: str = "", by: str = "") -> Path:
        if not (root / name).exists():
            shutil.copytree(tiny, root / name)
            tokenizer = AutoTokenizer.from_pretrained(root / name)
            tokenizer.add_special_tokens(token)
            tokenizer.chat_template = tokenizer.chat_template.replace(replacing, by)
            tokenizer.save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    def make(model: Path, rows: list[Any] = ROWS, valid: list[Any] | None = None, **more: Any) -> Job:
        train = write_rows(tmp_path / "train.jsonl", rows)
        validation = write_rows(tmp_path / "valid.jsonl", valid) if valid else None
        return Job(tmp_path / "job", model, train, validation, {**FULL, "batch_size": 12, **more})

    return make


def test_ids_beyond_the_embedding_are_not_padded_with(larger: Callable[..., Path], job: Callable[..., Job]) -> None:
    made = job(larger("padout", {"pad_token": "[PAD]"}), valid=ROWS, batching="padded").run()
    assert len(made.curve("valid_loss")) == 1
    again = AutoModelForCausalLM.from_pretrained(made.result())
    assert again.config.pad_token_id < 263
    assert AutoTokenizer.from_pretrained(made.result()).pad_token == "[PAD]"


def test_ids_beyond_the_embedding_in_the_models_own_configuration(
    larger: Callable[..., Path], job: Callable[..., Job]
) -> None:
    """What is padded with is named there too, and torch would not load the model."""
    model = larger("padded", {"pad_token": "[PAD]"})
    for file in (model / "config.json", model / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": 263}))
    made = job(model).run()
    assert AutoModelForCausalLM.from_pretrained(made.result()).config.pad_token_id < 263


EXTRA = {"additional_special_tokens": ["<|begin|>"]}


def failure(made: Job) -> str:
    assert made.attempt() == 1, made.log()
    assert not made.events(MetricsEvent)
    error = made.event(ErrorEvent)
    assert (error.code, error.param) == ("model_unavailable", "model")
    assert all(part in error.message for part in ("'<|begin|>'", *SIZES))
    return error.message


@pytest.mark.parametrize("batch_size", [1, 12])
def test_ids_beyond_the_embedding_in_the_template(
    larger: Callable[..., Path], job: Callable[..., Job], batch_size: int
) -> None:
    model = larger("extra", EXTRA, "<|im_start|>", "<|begin|>")
    assert "the chat template writes" in failure(job(model, batch_size=batch_size))


@pytest.mark.parametrize("where", ["training_file", "validation_file"])
def test_ids_beyond_the_embedding_in_some_rows(
    larger: Callable[..., Path], job: Callable[..., Job], where: str
) -> None:
    """The template writes the token for tools alone."""
    model = larger("tools", EXTRA, "'Tools:'", "'<|begin|>Tools:'")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    bad = [*ROWS[:3], {**ROWS[3], "tools": [tool]}, *ROWS[4:]]
    made = job(model, bad) if where == "training_file" else job(model, valid=bad)
    assert f"{where}: line 4: " in failure(made)
