"""A job on two devices, from the request to the model: a server, torchrun, TRL, and arbor replay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from completions import CHAT
from http_calls import JOBS, Answer, call
from jobs import standing_still, supervisor_of
from live import LiveServer
from waiting import until

from arbor_core.testing import device
from arbor_core.testing.sockets import beyond_loopback, descendants, listening

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.ml,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(device().kind == "cuda", reason="one GPU, and NCCL wants one for each rank"),
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(folder)], check=True, capture_output=True)
    return folder


def test_a_job_on_two_devices(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tiny: Path
) -> None:
    server = start_server(
        "+trainer=sft", "gpu.train=[0,1]", "launcher=torchrun", f"models.dirs=[{tiny.parent}]", mock=False
    )
    settings = {"n_epochs": 8, "batch_size": 4, "learning_rate": 3e-3}
    job = server.client.fine_tuning.jobs.create(
        model="tiny",
        training_file=server.upload(chat_rows),
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": settings}},
        extra_body={"num_gpus": 2},
    )
    server.wait(job.id, "running", seconds=120)
    events = server.storage / "jobs" / job.id / "attempts" / "1" / "events.jsonl"
    until(lambda: events.exists() and '"metrics"' in events.read_text(), seconds=300)
    with standing_still(server, job.id):
        processes = descendants(supervisor_of(server, job.id))
        found = {pid: listening(pid) for pid in processes}
    assert len(processes) >= 4 and any(found.values()), f"they train together: {found}"
    assert not beyond_loopback(one for addresses in found.values() for one in addresses), found
    ended = server.wait(job.id, seconds=300)
    assert ended.status == "succeeded", ended.error
    assert server.stop() == 0
    command = [sys.executable, "-m", "arbor_core", "replay", job.id, "--storage", str(server.storage)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "24 steps repeated: all losses are equal and the digests of the parameters after 24 of them" in ran.stdout


def test_both_ranks_send_the_policy_that_answers(start_server: Callable[..., LiveServer], tiny: Path) -> None:
    """The mock's sender lets a version out only when every rank has sent it."""
    chosen = ("inference=mock_direct", "engine.devices=1", "engine.replicas=1")
    server = start_server("gpu.train=[0,1]", "launcher=torchrun", *chosen, f"models.dirs=[{tiny.parent}]", mock=False)
    settings = {"num_generations": 2, "groups_per_step": 1, "learning_rate": 1e-2, "checkpoint_steps": 1}
    method = {"type": "grpo", "grpo": {"hyperparameters": settings}}
    job = call(server.url, "POST", JOBS, {"model": "tiny", "method": method, "num_gpus": 2}).json["id"]
    said = {"messages": [{"role": "user", "content": "say a letter"}]}
    group = [
        {**said, "completion": {"role": "assistant", "content": text}, "reward": reward}
        for text, reward in (("a", 1.0), ("b", 0.0))
    ]
    asked = {"model": job, "messages": [{"role": "user", "content": "[mock: weights=1]"}]}
    for step in (1, 2):
        sent = call(server.url, "POST", "/v1/fine_tuning/grpo/step", {"job_id": job, "batch": group})
        assert sent.status == 200, sent.body
        saved = server.storage / "jobs" / job / "checkpoints" / f"{step}-1" / "adapter_model.safetensors"
        until(saved.exists, seconds=300)
        expected = sha256(saved.read_bytes()).hexdigest()
        answer = until(lambda: (found := call(server.url, "POST", CHAT, asked)).status == 200 and found)
        until(lambda expected=expected: content(call(server.url, "POST", CHAT, asked)) == expected)
        assert content(answer) != "base"
    assert not (saved.parents[2] / "weights").exists(), "they are no files"
    processes = descendants(supervisor_of(server, job))
    assert len(processes) >= 4, "the supervisor's worker, torchrun and two ranks"
    server.cancel_all()


def content(answer: Answer) -> str:
    return str(answer.json["choices"][0]["message"]["content"])
