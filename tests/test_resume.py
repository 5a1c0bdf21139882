"""What a job keeps from its first attempt to its last, over pauses, deaths and servers with other settings."""

from __future__ import annotations

import json
import signal
from typing import Any

from test_lifecycle import create, events, until

SLOW = {"steps": 400, "step_seconds": 0.05, "checkpoint_steps": 2}


def placed(server: Any, job_id: str, attempt: int) -> Any:
    path = server.storage / "jobs" / job_id / "attempts" / str(attempt) / "placement.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_row_102_a_job_keeps_its_threads_and_says_when_the_processor_is_another(start_server, chat_rows):
    server = start_server("gpu.train=[0]", "threads=2")
    job = create(server, chat_rows, hyperparameters=SLOW)
    until(lambda: list(server.client.fine_tuning.jobs.checkpoints.list(job.id)))
    client = server.new_client(_strict_response_validation=False)  # OpenAI's own type lacks "paused"
    client.fine_tuning.jobs.pause(job.id)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
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
