"""The real client of another project, unchanged, through a whole compilation. `make clients` sets it up and runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from grpo_http import MODEL, Job, call, launch, stop

PYTHON = os.environ.get("ARBOR_CLIENTS_PYTHON", "")
"""Interpreter of the environment with arbor-ai and dspy."""
STEPS = 4

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PYTHON, reason="ARBOR_CLIENTS_PYTHON is not set: make clients"),
]


def test_arbor_ai_compiles_a_program(tmp_path: Path) -> None:
    server = launch(tmp_path)
    try:
        script = Path(__file__).with_name("stock_client.py")
        env = {**os.environ, "PYTHONPATH": "", "NO_PROXY": "*", "DSPY_CACHEDIR": str(tmp_path / "cache")}
        command = [PYTHON, str(script), server.url, MODEL, str(STEPS)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=170, env=env)
        assert ran.returncode == 0, ran.stderr[-4000:]
        seen = json.loads(ran.stdout.splitlines()[-1])
        (made,) = call(server.url, "GET", "/v1/fine_tuning/jobs").json["data"]
        job = Job(server, made["id"])
        status = job.status
        assert seen["model"] == f"openai/arbor:{job.id}"
        assert seen["answer"], "the program goes on after the end of training"
        assert len(seen["sent"]) >= STEPS + 1
        assert status["status"] == "succeeded"
        assert status["policy_version"] >= STEPS
        for name, checkpoint in status["checkpoints"].items():
            assert name.startswith("model_checkpoint_"), name
            assert call(server.url, "GET", f"/v1/models/{checkpoint['checkpoint_dir']}").status == 200
        steps = [event["data"] for event in job.events() if event["type"] == "metrics"]
        assert all("format_failures" in step for step in steps)
        assert "validation_score" in steps[0]
    finally:
        stop(server)
