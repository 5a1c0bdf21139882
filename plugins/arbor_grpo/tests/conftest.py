"""Fixtures: one tiny model for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the machine-learning libraries")

sys.path.insert(0, str(Path(__file__).parent))  # grpo_jobs.py, whatever the import mode

from grpo_http import Job as LiveJob
from grpo_http import created, launch, stop
from grpo_jobs import TWO_LAYERS, Job, write_model
from live import LiveServer
from transformers import Qwen2Config, Qwen2ForCausalLM


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return write_model(path, Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True, **TWO_LAYERS)


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Callable[..., Job]:
    """`job("name", max_steps=3)` makes a job's directory."""

    def make(name: str = "job", adapter: Path | None = None, **hyperparameters: Any) -> Job:
        keys = {"dtype": "float32", **hyperparameters}  # so that a GPU computes what the reference does
        return Job(tmp_path / name, "grpo", [], str(tiny), keys, adapter=adapter)

    return make


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with the mock trainer."""
    live = launch(tmp_path_factory.mktemp("server"))
    yield live
    stop(live)


@pytest.fixture
def live_job(server: LiveServer) -> Iterator[LiveJob]:
    """A job of the server's."""
    job = created(server)
    yield job
    job.post("cancel")
