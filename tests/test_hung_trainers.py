"""Trainers that hang before their first step. `row_N` as in docs/faults.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from http_calls import call
from live import LiveServer
from test_storage_faults import check_and_stop, events, until

from arbor_core.inbox import Group, Rollout
from arbor_core.pulse import HEARTBEAT, Watch
from arbor_core.testing import JobDirectory
from arbor_core.worker import WorkerRun, open_run


def test_row_90_a_trainer_that_hangs_before_its_first_step_is_ended_and_tried_again(
    start_server: Callable[..., LiveServer],
) -> None:
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
    watch = Watch(run.attempt_dir / HEARTBEAT)
    run.message("loading")
    watch.silent()
    assert not watch.begun
    assert len(run.groups(0, 0.0)) == 1
    watch.silent()
    assert watch.begun
