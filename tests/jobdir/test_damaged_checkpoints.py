"""Checkpoints that are found to be damaged: withdrawn, set aside, trained again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_calls import JOBS, call
from jobs import awaited_supervisor, create, events, hanging, offered, pause, stopped
from live import LiveServer
from openai import NotFoundError
from waiting import until

from arbor_core import ErrorEvent, MetricsEvent
from arbor_core.jobdir import checkpoints
from arbor_core.jobdir.cleanup import reconciled
from arbor_core.jobdir.layout import JobDir
from arbor_core.testing import JobDirectory
from arbor_core.testing.invariants import check_invariants, processes

Rows = list[dict[str, Any]]


def chat(server: LiveServer, model: str) -> str | None:
    said = server.client.chat.completions.create(model=model, messages=[{"role": "user", "content": "still there?"}])
    return said.choices[0].message.content


@pytest.mark.parametrize("damage", ["cut short", "a flipped bit"])
def test_row_94_a_damaged_checkpoint_is_withdrawn_until_it_is_trained_again(
    start_server: Callable[..., LiveServer], chat_rows: Rows, damage: str
) -> None:
    server = start_server("gpu.train=[0]")
    client = server.new_client(_strict_response_validation=False)  # OpenAI's own type lacks "paused"
    job = create(server, chat_rows, hyperparameters=hanging(23, steps=60, checkpoint_steps=10)).id
    until(lambda: stopped(server, job))
    name = until(lambda: offered(server, job).get(20))
    pause(server, job)
    newest = max(offered(server, job))
    lost = [step for step in offered(server, job) if step > 10]
    folder = server.storage / "jobs" / job / "checkpoints"
    for step in lost:
        weights = folder / f"{step}-1" / "adapter_model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:9] if damage == "cut short" else content[:-1] + bytes([content[-1] ^ 1]))
    client.fine_tuning.jobs.resume(job)
    until(lambda: [event for event in events(server, job) if f"checkpoint {newest}-1 is not used" in event.message])
    assert server.wait(job).status == "succeeded"
    told = [event for event in events(server, job) if event.level == "error"]
    assert [event.message.split()[1] for event in told] == [f"{step}-1" for step in sorted(lost, reverse=True)]
    assert sorted(path.name for path in checkpoints.aside(folder)) == sorted(f"{step}-1.damaged" for step in lost)
    assert {path.name for path in checkpoints.newest_first(folder)} == {"10-1", *(f"{n}0-2" for n in range(2, 7))}
    assert sorted(offered(server, job)) == [10, 20, 30, 40, 50, 60], "the step at which it was paused is no due one"
    assert chat(server, name)
    assert server.stop() == 0
    until(lambda: not processes(server.storage))
    check_invariants(server.storage)


def test_row_94_a_checkpoint_that_dies_with_its_trainer_is_withdrawn_before_anybody_resumes(
    start_server: Callable[..., LiveServer], chat_rows: Rows
) -> None:
    server = start_server("gpu.train=[0]")
    job = create(server, chat_rows, hyperparameters={"steps": 9999, "step_seconds": 0.05, "checkpoint_steps": 5}).id
    names = until(lambda: len(found := offered(server, job)) > 1 and found)
    server.stop(signal.SIGKILL)
    os.kill(awaited_supervisor(server, job), signal.SIGKILL)
    folder = server.storage / "jobs" / job
    until(lambda: not processes(server.storage))
    (folder / "checkpoints" / "10-1" / "adapter_model.safetensors").unlink()
    server = start_server("gpu.train=[0]", "limits.attempts=1")
    server.wait(job, "failed")
    assert {5, 10} & set(offered(server, job)) == {5}
    with pytest.raises(NotFoundError):
        chat(server, names[10])
    assert chat(server, names[5])
    assert (folder / "checkpoints" / "10-1.damaged").is_dir()
    assert server.stop() == 0
    until(lambda: not processes(server.storage))
    check_invariants(server.storage)


def test_a_trainer_that_damages_what_it_writes_is_not_tried_for_ever(
    start_server: Callable[..., LiveServer], chat_rows: Rows
) -> None:
    server = start_server("gpu.train=[0]", "limits.attempts=3")
    fault = {"fault": "bad_checkpoint", "fault_step": 5, "fault_times": 99}
    hyper = {"steps": 6, "step_seconds": 0, "checkpoint_steps": 2, **fault}
    job = create(server, chat_rows, hyperparameters=hyper).id
    failed = server.wait(job, "failed")
    assert failed.error.code == "worker_crashed"
    assert set(offered(server, job)) == {2}, "that of step 4 came to nothing each time"
    assert len(list((server.storage / "jobs" / job / "attempts").iterdir())) == 3


def committed(job_dir: Path, step: int, attempt: int) -> Path:
    folder = job_dir / "checkpoints" / f"{step}-{attempt}"
    with checkpoints.writing(folder, step, attempt, {}) as inside:
        (inside / "deep").mkdir()
        (inside / "deep" / "weights").write_bytes(b"1234")
    return folder


def test_what_is_cut_short_is_seen_without_reading(tmp_path: Path) -> None:
    whole, short, changed = (committed(tmp_path, step, 1) for step in (2, 4, 6))
    (short / "deep" / "weights").write_bytes(b"12")
    (changed / "deep" / "weights").write_bytes(b"1235")
    found = {event.dir: event.type for event in reconciled(JobDir(tmp_path).attempt(1))}
    assert found == {"2-1": "checkpoint", "4-1": "withdrawn", "6-1": "checkpoint"}
    assert [checkpoints.fault(path) is None for path in (whole, short, changed)] == [True, False, False]


def test_looking_at_a_checkpoint_forces_nothing_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle) or real(handle))
    folder = committed(tmp_path, 2, 1)
    assert len(synced) >= 5, "the file, its folder, the manifest, the checkpoint and its parent"
    synced.clear()
    assert checkpoints.fault(folder) is None
    assert not synced


def test_damaged_ones_do_not_take_the_place_of_whole_ones(tmp_path: Path) -> None:
    for step, attempt in ((2, 1), (4, 1), (6, 1), (6, 2), (8, 2)):
        committed(tmp_path, step, attempt)
    for name in ("6-1", "8-2"):
        checkpoints.set_aside(tmp_path / "checkpoints" / name)
    found = [path.name for path in checkpoints.superseded(tmp_path / "checkpoints", 2)]
    assert found == ["2-1", "6-1.damaged"], "nothing newer than 8-2 is whole, so what is left of it stays"


def test_a_checkpoint_that_another_job_began_with_is_kept(
    start_server: Callable[..., LiveServer], chat_rows: Rows
) -> None:
    pytest.importorskip("arbor_grpo", reason="brings the route")
    server = start_server("gpu.train=[0]")
    first = create(server, chat_rows, hyperparameters={"steps": 6, "step_seconds": 0, "checkpoint_steps": 2}).id
    server.wait(first)
    body = {"model": offered(server, first)[2], "trainer_config": {"num_generations": 2}}
    answer = call(server.url, "POST", "/v1/fine_tuning/grpo/initialize", body)
    assert answer.status == 200, answer.body
    folder = server.storage / "jobs" / first / "checkpoints"
    assert [path.name for path in checkpoints.superseded(folder, 1)] == ["4-1"]
    answer = call(server.url, "POST", f"{JOBS}/{answer.json['job_id']}/cancel")
    assert answer.status == 200, answer.body


def test_a_job_whose_checkpoints_were_all_set_aside_does_not_start_anew(tmp_path: Path, chat_rows: Rows) -> None:
    hyper = {"steps": 6, "step_seconds": 0, "checkpoint_steps": 2, "fault": "crash", "fault_step": 3}
    job = JobDirectory(tmp_path / "job", "mock", chat_rows, "mock/tiny", hyper)
    assert job.attempt() == -signal.SIGKILL
    checkpoints.set_aside(job.dir / "checkpoints" / "2-1")  # by a server that saw it, or a worker that died then
    assert job.attempt() == 1
    [error] = job.events(ErrorEvent)
    assert error.code == "checkpoint_corrupted"
    assert "2-1.damaged" in error.message
    assert not job.events(MetricsEvent)


@pytest.mark.parametrize("damaged", [[4], [2, 4]], ids=["falls-back", "none-is-left"])
def test_row_94_damaged_checkpoints(tmp_path: Path, chat_rows: list[dict[str, Any]], damaged: list[int]) -> None:
    hyper = {"steps": 6, "step_seconds": 0, "checkpoint_steps": 2, "fault": "crash", "fault_step": 5}
    job = JobDirectory(tmp_path / "job", "mock", chat_rows, "mock/tiny", hyper)
    assert job.attempt() == -signal.SIGKILL
    for step in damaged:
        (job.dir / "checkpoints" / f"{step}-1" / "adapter_model.safetensors").write_bytes(b"")
    status = job.attempt()
    told = [event.message for event in job.events() if event.level == "error"]
    assert "checkpoint 4-1 is not used" in told[0]
    if damaged == [4]:
        assert status == 0
        assert [event.data["step"] for event in job.events(MetricsEvent)] == [3, 4, 5, 6]
    else:
        assert status == 1
        [error] = job.events(ErrorEvent)
        assert error.code == "checkpoint_corrupted"
        assert not job.events(MetricsEvent)
