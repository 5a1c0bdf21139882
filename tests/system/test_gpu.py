"""What only a GPU shows: the real trainers and the engine on one, and what they do when it is full.

On a machine without a GPU these are skipped. With one, `ARBOR_TEST_DEVICE=cuda make test` also runs the trainers' and
the engine's own tests on it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer, launch
from waiting import until

from arbor_core.builtin.allocator import find_gpus

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.ml,
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not find_gpus(), reason="needs a GPU"),
]
WORDS = ("red", "green", "blue", "white", "black", "brown")
ROWS = [
    {"messages": [{"role": "user", "content": f"color {n % 6}"}, {"role": "assistant", "content": WORDS[n % 6]}]}
    for n in range(60)
]
HOG = """
import sys, torch
left = int(sys.argv[1])
held = []
while (free := torch.cuda.mem_get_info()[0]) > left:
    held.append(torch.empty(min(free - left, 1 << 30), dtype=torch.uint8, device="cuda"))
print("held", flush=True)
sys.stdin.read()
"""
"""Takes all of the GPU's memory but so many bytes until its input ends."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("gpu")
    tiny = folder / "models" / "tiny"
    subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(tiny)], check=True, capture_output=True)
    live = launch(folder, "+trainer=sft", f"models.dirs=[{folder / 'models'}]", mock=False)
    yield live
    live.cancel_all()
    live.stop()


def supervised(server: LiveServer, **hyperparameters: Any) -> Any:
    keys = {"batch_size": 10, "learning_rate": 3e-3, "n_epochs": 12, **hyperparameters}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": keys}}
    return server.client.fine_tuning.jobs.create(model="tiny", training_file=server.upload(ROWS), seed=7, method=method)


def messages(server: LiveServer, job: str) -> list[str]:
    return [event.message for event in server.client.fine_tuning.jobs.list_events(job, limit=100)]


def losses(server: LiveServer, job: str) -> dict[int, float]:
    events = list(server.client.fine_tuning.jobs.list_events(job, limit=100))
    return {e.data["step"]: e.data["train_loss"] for e in events if e.type == "metrics"}  # type: ignore[index]


def ask(server: LiveServer, model: str, text: str, **options: Any) -> Any:
    said: Any = [{"role": "user", "content": text}]
    return server.client.chat.completions.create(model=model, messages=said, max_tokens=12, **options)


@pytest.mark.parametrize("lora", [None, {"r": 8}], ids=["full", "lora"])
def test_a_job_trains_in_bfloat16_and_its_model_answers_from_the_same_gpu(server: LiveServer, lora: Any) -> None:
    job = server.wait(supervised(server, lora=lora, n_epochs=25, learning_rate=1e-2 if lora else 3e-3).id, seconds=200)
    assert job.status == "succeeded", job.error
    assert any("parameters on cuda" in said for said in messages(server, job.id))
    assert min(losses(server, job.id).values()) < losses(server, job.id)[1] / 2
    right = [
        ask(server, job.fine_tuned_model, f"color {n}", temperature=0).choices[0].message.content == WORDS[n]
        for n in range(6)
    ]
    assert sum(right) >= (5 if lora is None else 2)


def test_row_89_a_trainer_killed_on_a_gpu_goes_on_from_its_checkpoint(server: LiveServer) -> None:
    undisturbed = server.wait(supervised(server, lora=None, checkpoint_steps=10).id, seconds=200)
    job = supervised(server, lora=None, checkpoint_steps=10)
    folder = server.storage / "jobs" / job.id
    until((folder / "checkpoints" / "10-1").is_dir, 200)
    os.kill(worker_of(folder), signal.SIGKILL)
    job = server.wait(job.id, seconds=200)
    assert (folder / "attempts" / "2").is_dir()
    assert job.status == "succeeded", job.error
    one, other = losses(server, undisturbed.id), losses(server, job.id)
    assert sorted(one) == sorted(other) == list(range(1, 73))
    assert other == pytest.approx(one, rel=0.05, abs=0.01)


def worker_of(folder: Path) -> int:
    """Process id of the trainer that works for a job: the child of its supervisor."""
    supervisor = (folder / "attempts" / "1" / "keeper").read_text().split(":")[0]
    return int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])


def test_row_88_a_gpu_that_others_have_filled(server: LiveServer) -> None:
    """A step that does not fit beside them: tried with smaller micro-batches, then failed, and the server goes on."""
    with subprocess.Popen(
        [sys.executable, "-c", HOG, str(700 << 20)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout
        assert hog.stdout.readline() == b"held\n"
        try:
            job = server.wait(supervised(server, lora=None).id, "failed", seconds=200)
        finally:
            hog.communicate()
    assert job.error.code == "out_of_memory", job.error
    assert "CUDA out of memory" in job.error.message or "CUDA error: out of memory" in job.error.message
    assert server.wait(supervised(server, lora=None, n_epochs=1).id, seconds=200).status == "succeeded"
