"""The real client of another project, unchanged, through a whole compilation. `make clients` sets it up and runs it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grpo_http import MODEL, Job, call, launch, stop
from live import LiveServer

INSTRUCTION, WORDS = "Say one of the words.", ("one", "two", "three", "four")
"""As in stock_client.py, which this environment cannot import."""
PYTHON = os.environ.get("ARBOR_CLIENTS_PYTHON", "")
"""Interpreter of the environment with arbor-ai and dspy."""

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PYTHON, reason="ARBOR_CLIENTS_PYTHON is not set: make clients"),
]


def compiled(server: LiveServer, folder: Path, **options: Any) -> tuple[dict[str, Any], Job]:
    """What the client has seen, and the job it made."""
    script = Path(__file__).with_name("stock_client.py")
    env = {**os.environ, "PYTHONPATH": "", "NO_PROXY": "*", "DSPY_CACHEDIR": str(folder / "cache")}
    command = [PYTHON, str(script), server.url, json.dumps(options)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert ran.returncode == 0, ran.stderr[-4000:]
    seen = json.loads(ran.stdout.splitlines()[-1])
    made = call(server.url, "GET", "/v1/fine_tuning/jobs").json["data"][0]
    return seen, Job(server, made["id"])


def test_arbor_ai_compiles_a_program(tmp_path: Path) -> None:
    server = launch(tmp_path)
    try:
        seen, job = compiled(server, tmp_path, model=MODEL, steps=4, wanted=None)
        status = job.status
        assert seen["model"] == f"openai/arbor:{job.id}"
        assert seen["answer"], "the program goes on after the end of training"
        assert seen["another"]
        assert len(seen["sent"]) >= 5
        assert status["status"] == "succeeded"
        assert status["policy_version"] >= 4
        for name, checkpoint in status["checkpoints"].items():
            assert name.startswith("model_checkpoint_"), name
            assert call(server.url, "GET", f"/v1/models/{checkpoint['checkpoint_dir']}").status == 200
        steps = [event["data"] for event in job.events() if event["type"] == "metrics"]
        assert all("format_failures" in step for step in steps)
        assert "validation_score" in steps[0]
    finally:
        stop(server)


def warm_up(server: LiveServer) -> str:
    """A model that knows how to answer, and is right about once in four times."""
    numbers = random.Random(0)
    rows = []
    for _ in range(600):
        words = numbers.sample(WORDS, len(WORDS))
        answer = {"role": "assistant", "content": numbers.choice(words)}
        rows.append({"messages": [*ask(" ".join(words)), answer]})
    hyperparameters = {"max_steps": 80, "batch_size": 32, "learning_rate": 3e-3, "lora": None}
    body = {
        "model": "tiny",
        "training_file": server.upload(rows),
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": 1,
    }
    made = call(server.url, "POST", "/v1/fine_tuning/jobs", body)
    assert made.status == 200, made.body
    return str(server.wait(made.json["id"], seconds=170).fine_tuned_model)


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]


@pytest.mark.ml
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_arbor_ai_teaches_a_real_model(tmp_path: Path) -> None:
    models = tmp_path / "models"
    subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(models / "tiny")], check=True)
    server = launch(tmp_path, f"models.dirs=[{models}]", mock=False)
    try:
        train = {"learning_rate": 5e-4, "warmup_steps": 0, "scale_rewards": True}
        seen, job = compiled(
            server,
            tmp_path,
            model=warm_up(server),
            steps=20,
            wanted="two",
            rollouts=8,
            validate_every=10,
            validation=24,
            max_tokens=8,
            train=train,
        )
        assert job.status["status"] == "succeeded"
        steps = [event["data"] for event in job.events() if event["type"] == "metrics"]
        assert len(steps) >= 20
        first, *_, last = seen["validation"]
        assert last > first + 30, f"the score is to rise: {seen['validation']}"
    finally:
        stop(server)
