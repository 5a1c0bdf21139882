"""The examples run as they stand, against the mock server; the plugin is installed and checked like a stranger's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

EXAMPLES = Path(__file__).parent.parent / "examples"
PLUGIN = EXAMPLES / "plugin"


@pytest.fixture
def data(tmp_path: Path, chat_rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    return path


def run(command: list[str], input_: str = "", **variables: str) -> str:
    """What a command prints; it must succeed."""
    ran = subprocess.run(
        command, input=input_, capture_output=True, text=True, env={**os.environ, **variables}, timeout=120
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def test_quickstart(server: LiveServer, data: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), str(data), "mock/tiny", "n_epochs=2"]
    said = run(command, "good morning\n\n", OPENAI_BASE_URL=f"{server.url}/v1")
    assert "The job has successfully completed" in said
    assert "Chatting with ft:mock/tiny:" in said
    answer = said.rpartition("> ")[0].rpartition("> ")[2]
    assert {"good", "morning"} & set(answer.split())


def test_quickstart_says_why_a_job_failed(server: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\n' * 10)
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), str(path), "mock/tiny"]
    variables = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    assert ran.returncode == 1
    assert "line 1: 'messages' must be a list" in ran.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: LiveServer, data: Path) -> None:
    said = run(["sh", str(EXAMPLES / "curl.sh"), str(data), "mock/tiny"], ARBOR_URL=server.url)
    assert "fine_tuning.job.event" in said
    assert '"chat.completion"' in said
    assert said.rstrip().endswith("data: [DONE]")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the example plugin installed in it, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source)  # a build must not write into the checkout
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)])
    return str(folder)


def test_plugin_conforms(site: str, chat_rows: list[dict[str, Any]]) -> None:
    check = (
        "import json, sys; from arbor_core.testing import check_trainer; "
        "check_trainer('bigram', rows=json.load(sys.stdin), model='none'); print('conforms')"
    )
    assert run([sys.executable, "-c", check], json.dumps(chat_rows), PYTHONPATH=site) == "conforms\n"


def test_plugin_trains_through_the_api(
    site: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("launcher=cold", env={"PYTHONPATH": site})
    server.new_client(_strict_response_validation=False)  # OpenAI's schema knows no method 'bigram'
    job = server.client.fine_tuning.jobs.create(
        model="mock/tiny",
        training_file=server.upload(chat_rows),
        method={"type": "bigram", "bigram": {"hyperparameters": {"batch_size": 3}}},  # type: ignore[typeddict-item]
    )
    job = server.wait(job.id)
    assert job.status == "succeeded", job.error
    events = server.client.fine_tuning.jobs.list_events(job.id, limit=50).data
    losses = [event.data["train_loss"] for event in reversed(events) if event.type == "metrics"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert job.trained_tokens == sum(len(row["messages"][1]["content"]) + 1 for row in chat_rows)
