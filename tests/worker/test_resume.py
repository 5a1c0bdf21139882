"""What a job keeps from its first attempt to its last, over pauses, deaths and servers with other settings."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import create, events, pause
from waiting import until

from arbor_core.dispatch import dispatcher
from arbor_core.testing import JobDirectory
from arbor_core.types import CheckpointEvent, CheckpointWithdrawn, ResultEvent

SLOW = {"steps": 400, "step_seconds": 0.05, "checkpoint_steps": 2}


def placed(server: Any, job_id: str, attempt: int) -> Any:
    path = server.storage / "jobs" / job_id / "attempts" / str(attempt) / "placement.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_row_102_a_job_keeps_its_threads_and_says_when_the_processor_is_another(start_server, chat_rows):
    server = start_server("gpu.train=[0]", "threads=2")
    job = create(server, chat_rows, hyperparameters=SLOW)
    until(lambda: list(server.client.fine_tuning.jobs.checkpoints.list(job.id)))
    pause(server, job.id)
    papers = server.storage / "jobs" / job.id / "job.json"
    papers.write_text(json.dumps({**json.loads(papers.read_text()), "cpu": "abacus"}))
    server.stop(signal.SIGKILL)

    server = start_server("gpu.train=[0]", "threads=1")
    server.client.fine_tuning.jobs.resume(job.id)
    until(lambda: [event for event in events(server, job.id) if event.level == "warn" and "abacus" in event.message])
    assert placed(server, job.id, 1)["threads"] == placed(server, job.id, 2)["threads"] == 2
    assert server.client.fine_tuning.jobs.cancel(job.id)
    other = create(server, chat_rows)
    server.wait(other.id)
    assert placed(server, other.id, 1)["threads"] == 1


@pytest.mark.parametrize(
    ("wanted", "patience", "found"),
    [
        pytest.param("run", 60, "ref", id="room"),
        pytest.param("pause", 60, None, id="pause"),
        pytest.param("run", 0, OSError, id="no-room"),
    ],
)
async def test_row_95_an_attempt_waits_for_room_to_start_for_some_time(monkeypatch, tmp_path, wanted, patience, found):
    monkeypatch.setattr(dispatcher, "POLL_SECONDS", 0.01)
    tries = []

    async def start(*_: Any) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "ref"

    job = SimpleNamespace(id="ftjob-x", attempt=1, instruction=wanted)
    attempts = SimpleNamespace(start=start, root=tmp_path)
    allocator = SimpleNamespace(set_aside=lambda *_: None)
    made = dispatcher.Dispatcher(
        SimpleNamespace(get=lambda _: job, store=None),
        attempts,
        None,
        None,
        {},
        None,
        allocator,
        Path("unused"),
        patience,
    )
    if found is OSError:
        with pytest.raises(OSError, match="No space"):
            await made._started(job, None, None)
    else:
        assert await made._started(job, None, None) == found
    assert len(tries) == (3 if found == "ref" else 1)


DIVERGES = """
def train(run):
    last = run.last_checkpoint()
    metrics = {"train_loss": 1.5, "valid_loss": float("nan"), "ratio": float("inf")}
    with run.checkpoint(last.step + 1 if last else 1, **metrics) as folder:
        (folder / "weights").write_bytes(b"1234")
    run.finish(run.last_checkpoint(), 1)
"""


def test_a_checkpoint_whose_metrics_are_not_finite_is_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diverges.py").write_text(DIVERGES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    job = JobDirectory(tmp_path / "job", "mock", [], "mock/tiny")
    job.entry = "diverges:train"
    for step in (1, 2):
        assert job.attempt() == 0, job.log
        assert [event.metrics for event in job.events(CheckpointEvent)] == [{"train_loss": 1.5}]
        assert [event.step for event in job.events(ResultEvent)] == [step]
        assert not job.events(CheckpointWithdrawn)
