"""Trainers that hang before their first step, and trainers that do not: they stood still with all the machine.

`row_N` as in docs/faults.md.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from http_calls import call
from jobs import check_and_stop, events, step_events, train
from live import LiveServer
from waiting import until

from arbor_core.dispatch.monitor import Monitor, MonitoredAttempt
from arbor_core.jobdir.heartbeat import Heartbeat, HeartbeatMonitor
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.testing import JobDirectory
from arbor_core.testing.invariants import processes
from arbor_core.types import Group, Rollout
from arbor_core.worker.run import WorkerRun, open_run

HEARTBEAT = AttemptDir(Path()).heartbeat.name


def test_row_90_a_trainer_that_hangs_before_its_first_step_is_ended_and_tried_again(
    start_server: Callable[..., LiveServer],
) -> None:
    pytest.importorskip("arbor_grpo", reason="brings the route")
    server = start_server("limits.start_seconds=3", "limits.heartbeat_seconds=100", "limits.attempts=9")
    client = server.new_client(_strict_response_validation=False)
    config = {"num_generations": 2, "fault": "hang", "fault_step": 0}
    asked = {"model": "mock/tiny", "trainer_config": config}
    job = call(server.url, "POST", "/v1/fine_tuning/grpo/initialize", asked).json["job_id"]
    until(lambda: any("not begun to train after 3 seconds" in event.message for event in events(server, job)))
    until(lambda: list(server.storage.glob(f"jobs/{job}/attempts/*/{HEARTBEAT}")))
    client.fine_tuning.jobs.cancel(job)
    server.wait(job, "cancelled")
    check_and_stop(server)


def test_row_90_who_waits_for_rollouts_has_begun(tmp_path: Path, chat_rows: list[dict[str, Any]]) -> None:
    job = JobDirectory(tmp_path / "job", "mock_grpo", chat_rows, "mock/tiny")
    job.send(Group(id=1, rollouts=(Rollout(reward=1.0),), version=0))
    run = open_run(job.prepare(), WorkerRun)
    monitor = HeartbeatMonitor(run.attempt_dir / HEARTBEAT)
    run.message("loading")
    monitor.check()
    assert not monitor.started
    assert len(run.groups(0, 0.0)) == 1
    monitor.check()
    assert monitor.started


def test_row_112_looks_without_a_beat_are_counted_and_no_clock_is_read(tmp_path: Path) -> None:
    path = tmp_path / HEARTBEAT
    monitor, heartbeat = HeartbeatMonitor(path), Heartbeat(path)
    heartbeat.beat_if_started()
    assert not path.exists(), "before the first step it does not beat"
    heartbeat.beat()
    os.utime(path, (1, 1))  # a clock that was an age behind
    monitor.check()
    assert (monitor.started, monitor.missed) == (True, 0)
    for missed in (1, 2, 3):
        monitor.check()
        assert monitor.missed == missed
    os.utime(path, (1 << 33, 1 << 33))
    monitor.check()
    assert monitor.missed == 0


@pytest.mark.parametrize(("allowed", "looks"), [(3.0, 4), (1.0, 2), (0.1, 2)])
@pytest.mark.parametrize("begun", [True, False])
async def test_row_90_a_trainer_is_ended_by_as_many_looks_as_seconds(
    tmp_path: Path, allowed: float, looks: int, begun: bool
) -> None:
    """However late each of them comes: the machine may have stood still before."""
    ended: list[str] = []
    seconds = (allowed, 1e9) if begun else (1e9, allowed)
    limits: Any = SimpleNamespace(heartbeat_seconds=seconds[0], start_seconds=seconds[1])
    attempts: Any = SimpleNamespace(end_hung=lambda job: ended.append(job.id))
    executor: Any = SimpleNamespace(poll=lambda ref: True)
    unused: Any = None
    monitor = Monitor(attempts, unused, unused, executor, limits)
    job = cast("Any", SimpleNamespace(id="ftjob-x", ref="1", offset=0))
    monitor.monitored[job.id] = MonitoredAttempt(job, AttemptDir(tmp_path), HeartbeatMonitor(tmp_path / HEARTBEAT))
    if begun:
        (tmp_path / HEARTBEAT).touch()
        await monitor.go_round()
    for _ in range(looks):
        assert not ended
        await monitor.go_round()
    assert ended == [job.id]


def test_row_90_a_machine_that_stood_still_loses_no_trainer(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=3")
    job = train(server, chat_rows, steps=60, step_seconds=0.05)
    [heartbeat] = until(lambda: list(server.storage.glob(f"jobs/{job}/attempts/1/{HEARTBEAT}")))
    others = processes(server.storage).keys() - {server.process.pid}
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: time.time() - heartbeat.stat().st_mtime > 1.5)  # the server has seen the last beat
    server.process.send_signal(signal.SIGSTOP)
    until(lambda: time.time() - heartbeat.stat().st_mtime > 6)
    server.process.send_signal(signal.SIGCONT)
    for _ in range(3):
        assert not [event for event in events(server, job) if event.level != "info"]
    for pid in others:
        os.kill(pid, signal.SIGCONT)
    assert server.wait(job).status == "succeeded"
    assert step_events(server, job) == list(range(1, 61))
    assert not list(server.storage.glob(f"jobs/{job}/attempts/2"))
    check_and_stop(server)


def test_row_90_a_trainer_that_hangs_is_ended_and_tried_again(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=2")
    job = train(server, chat_rows, steps=6, step_seconds=0.05, checkpoint_steps=2, fault="hang", fault_step=4)
    found = server.wait(job)
    assert found.status == "succeeded", found.error
    said = [event.message for event in events(server, job)]
    assert any("made no progress for 2 seconds" in text and "checkpoint at step 4" in text for text in said), said
    check_and_stop(server)


def test_row_90_a_trainer_that_keeps_hanging_fails(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=1", "limits.attempts=1")
    job = train(server, chat_rows, steps=6, step_seconds=0.05, checkpoint_steps=6, fault="hang", fault_step=2)
    found = server.wait(job, "failed")
    assert found.error.code == "worker_hung"
    check_and_stop(server)
