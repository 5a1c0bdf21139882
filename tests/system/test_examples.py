"""The examples run as they stand, against the mock server; the plugin is installed and checked like a stranger's."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer
from openai.types.fine_tuning import FineTuningJob

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGIN = EXAMPLES / "plugin"


@pytest.fixture
def data(tmp_path: Path, chat_rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    return path


def run(command: list[str], input_: str = "", **variables: str) -> str:
    """What a command prints; it must succeed."""
    ran = subprocess.run(
        command, input=input_, capture_output=True, text=True, env={**os.environ, **variables}, timeout=150
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
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=150)
    assert ran.returncode == 1
    assert "line 1 and 9 more: Invalid 'messages': Expected `array` of length >= 1. {" in ran.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: LiveServer, data: Path) -> None:
    said = run(["sh", str(EXAMPLES / "curl.sh"), str(data), "mock/tiny"], ARBOR_URL=server.url)
    assert "fine_tuning.job.event" in said
    assert '"chat.completion"' in said
    assert said.rstrip().endswith("data: [DONE]")


def test_grpo_with_openai(server: LiveServer) -> None:
    pytest.importorskip("arbor_grpo")
    command = [sys.executable, str(EXAMPLES / "grpo.py"), "mock/tiny", "colour", "2"]
    said = run(command, OPENAI_BASE_URL=f"{server.url}/v1")
    assert "Step 0: " in said
    assert said.count(" of 8") >= 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_grpo_with_curl(server: LiveServer) -> None:
    pytest.importorskip("arbor_grpo")
    said = run(["sh", str(EXAMPLES / "grpo.sh"), "mock/tiny", "2"], ARBOR_URL=server.url)
    assert "Step 2: " in said
    assert "succeeded" in said
    assert '"chat.completion"' in said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the example plugin installed in it, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source)  # a build must not write into the checkout
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)])
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_plugin_conforms(site: str, chat_rows: list[dict[str, Any]]) -> None:
    check = (
        "import json, sys; from arbor_core.testing import check_trainer; "
        "check_trainer('bigram', rows=json.load(sys.stdin), model='none'); print('conforms')"
    )
    assert run([sys.executable, "-c", check], json.dumps(chat_rows), PYTHONPATH=site) == "conforms\n"


def test_plugin_that_learns_from_rollouts_conforms(site: str) -> None:
    check = "from arbor_core.testing import check_trainer; check_trainer('reinforce', model='none'); print('conforms')"
    assert run([sys.executable, "-c", check], PYTHONPATH=site) == "conforms\n"


def test_plugin_that_executes_commands_conforms(site: str) -> None:
    check = (
        "from arbor_core.testing import check_trainer; "
        "check_trainer('interactive', model='none', commands=[b'tea', b'mud', b'tea']); print('conforms')"
    )
    assert run([sys.executable, "-c", check], PYTHONPATH=site) == "conforms\n"


def test_plugin_executes_commands_through_the_api(site: str, start_server: Callable[..., LiveServer]) -> None:
    server = start_server("start=cold", env={"PYTHONPATH": site})
    client = server.new_client(_strict_response_validation=False)
    body = {"model": "mock/tiny", "method": {"type": "interactive"}}
    job = client.post("/fine_tuning/jobs", body=body, cast_to=dict[str, Any])["id"]

    def loss(number: int) -> float:
        answer = client.post(f"/bigram/{job}/texts", body={"number": number, "text": "tea"}, cast_to=dict[str, float])
        return answer["loss"]

    losses = [loss(number) for number in (1, 2, 3, 3)]
    assert losses[0] > losses[1] > losses[2] == losses[3]
    client.post(f"/bigram/{job}/finish", cast_to=dict[str, Any])
    ended = server.wait(job)
    assert ended.status == "succeeded", ended.error
    assert ended.fine_tuned_model in [model.id for model in client.models.list().data]
    assert ended.trained_tokens == 3 * len("^tea")


def test_engine_of_the_plugin_conforms(site: str) -> None:
    """As docs/plugins.md has it checked."""
    page = (EXAMPLES.parent / "docs" / "plugins.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (check,) = [block for block in blocks if "check_backend(" in block]
    assert run([sys.executable, "-c", f"{check}\nprint('conforms')"], PYTHONPATH=site) == "conforms\n"


def test_plugin_learns_from_rewards_through_the_api(site: str, start_server: Callable[..., LiveServer]) -> None:
    pytest.importorskip("arbor_grpo")  # its routes send the groups
    server = start_server("start=cold", env={"PYTHONPATH": site})
    client = server.new_client(_strict_response_validation=False)
    hyperparameters = {"num_generations": 2, "max_staleness": 9}
    body = {"model": "mock/tiny", "method": {"type": "reinforce", "reinforce": {"hyperparameters": hyperparameters}}}
    job = client.post("/fine_tuning/jobs", body=body, cast_to=dict[str, Any])
    assert job["training_file"] == ""
    FineTuningJob.model_validate({**job, "method": None})  # OpenAI's schema knows no method 'reinforce'
    for _ in range(8):
        said = {"tea": 1.0, "mud": 0.0}
        question = [{"role": "user", "content": "What would you like?"}]
        batch = [
            {"messages": question, "completion": {"role": "assistant", "content": text}, "reward": reward}
            for text, reward in said.items()
        ]
        client.post("/fine_tuning/grpo/step", body={"job_id": job["id"], "batch": batch}, cast_to=dict[str, Any])

    def metrics() -> list[Any]:
        events = client.fine_tuning.jobs.list_events(job["id"], limit=100).data
        return [event.data for event in reversed(events) if event.type == "metrics"]

    while len(metrics()) < 8:
        assert client.fine_tuning.jobs.retrieve(job["id"]).status in ("queued", "running")
    client.post("/fine_tuning/grpo/terminate", body={"job_id": job["id"]}, cast_to=dict[str, Any])
    ended = client.fine_tuning.jobs.retrieve(job["id"])
    assert ended.status == "succeeded", ended.error
    losses = [data["train_loss"] for data in metrics()]
    assert losses[0] == pytest.approx(0.0, abs=1e-9)
    assert losses[-1] < -0.5  # what was rewarded has become likelier than what was not
    assert ended.trained_tokens == 8 * (len("^tea") + len("^mud"))


def test_plugin_trains_through_the_api(
    site: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("start=cold", env={"PYTHONPATH": site})
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


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/demo.py as a module, writing elsewhere. `make demo` runs all of it."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("demo")
    monkeypatch.setattr(module, "OUT", tmp_path)
    (tmp_path / "models").mkdir()
    return module


class InterruptedDemo(Exception):
    """Something goes wrong while the demo's server runs."""


def interrupted(demo: Any) -> None:
    with demo.serving(demo.OUT, "sft") as process:
        assert demo.address(process, demo.OUT).startswith("http://127.0.0.1:")
        raise InterruptedDemo(process)


@pytest.mark.ml
def test_demo_ends_its_server_whatever_happens(demo: Any) -> None:
    with pytest.raises(InterruptedDemo) as caught:
        interrupted(demo)
    assert caught.value.args[0].returncode == 0


@pytest.mark.parametrize(("before", "after", "status"), [(0.0, 0.99, 0), (0.2, 0.99, 1), (0.0, 0.7, 1)])
def test_demo_fails_unless_the_model_has_learned(demo: Any, before: float, after: float, status: int) -> None:
    assert demo.verdict(before, after) == status


def test_demo_shows_each_event_once_and_in_order(
    demo: Any, server: LiveServer, chat_rows: list[dict[str, Any]]
) -> None:
    job = server.client.fine_tuning.jobs.create(model="mock/tiny", training_file=server.upload(chat_rows))
    seen: set[str] = set()
    messages = []
    ended = False
    while not ended:
        ended = server.client.fine_tuning.jobs.retrieve(job.id).finished_at is not None
        messages += [event.message for event in demo.new_events(server.client, job.id, seen)]
    assert messages == [e.message for e in server.client.fine_tuning.jobs.list_events(job.id, limit=1000).data[::-1]]
    assert len(messages) > 50  # more than a page


def test_demo_draws_the_result_file(demo: Any, tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    table.write_text(
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,2.0,0.1,,\n2,1.0,0.5,1.1,0.4\n"
    )
    demo.draw(table, {0: 0.0, 2: 0.5}, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert importlib.import_module("plot").column(table, "valid_loss") == ([2], [1.1])
