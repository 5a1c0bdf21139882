"""The executor without processes, behind a real server."""

from __future__ import annotations

import signal
from pathlib import Path

from jobs import create, events, held, messages, step_events
from live import LiveServer
from waiting import until

SIMULATED = ("executor=mock", "scheduler=priority")


def children(server: LiveServer) -> list[str]:
    path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return path.read_text().split()


def test_a_simulated_job_is_told_like_a_real_one(start_server, chat_rows):
    server = start_server(*SIMULATED, "gpu.train=[0-99]")
    job = create(server, chat_rows, hyperparameters={"steps": 5, "checkpoint_steps": 2}, extra_body={"num_gpus": 100})
    job = server.wait(job.id)
    assert job.status == "succeeded", job.error
    assert step_events(server, job.id) == [1, 2, 3, 4, 5]
    started = next(event for event in events(server, job.id) if "started" in event.message)
    assert len(started.data["devices"]) == 100
    assert [c.step_number for c in server.client.fine_tuning.jobs.checkpoints.list(job.id)] == [5, 4, 2]
    assert len(server.client.files.content(job.result_files[0]).text.splitlines()) == 6
    assert until(lambda: not children(server)) and held(server) == 0


def test_a_simulated_job_pauses_for_another_and_is_cancelled(start_server, chat_rows):
    server = start_server(*SIMULATED, "gpu.train=[0]")
    low = create(server, chat_rows, hyperparameters={"steps": 40, "step_seconds": 0.05})
    until(lambda: len(step_events(server, low.id)) > 3)
    high = create(server, chat_rows, hyperparameters={"steps": 999, "step_seconds": 0.05}, extra_body={"priority": 1})
    server.wait(high.id, "running")
    server.client.fine_tuning.jobs.cancel(high.id)
    assert server.wait(high.id, "cancelled").error is None
    assert server.wait(low.id).status == "succeeded"
    assert step_events(server, low.id) == list(range(1, 41))


def test_a_job_is_preempted_on_the_machine_where_that_makes_room(start_server, chat_rows):
    """Two devices are free, each on a machine of its own: they do for nobody who needs two."""
    server = start_server(*SIMULATED, "allocator=mock_nodes", "gpu.train=[0-7]", "gpu.inference=[8]")
    long = {"steps": 999, "step_seconds": 0.05}
    lows = [create(server, chat_rows, hyperparameters=long, extra_body={"num_gpus": 3}) for _ in range(2)]
    until(lambda: all(step_events(server, low.id) for low in lows))
    high = create(server, chat_rows, hyperparameters={"steps": 3}, extra_body={"num_gpus": 2, "priority": 5})
    assert server.wait(high.id).status == "succeeded"
    gave = [low.id for low in lows if any("gave its devices" in text for text in messages(server, low.id))]
    assert len(gave) == 1
    where = {}
    for job_id in (high.id, *(low.id for low in lows)):
        [first, *_] = [event.data["node"] for event in events(server, job_id) if "job started" in event.message]
        where[job_id] = first
    assert where[high.id] == where[gave[0]] and len(set(where.values())) == 2
    for low in lows:
        server.client.fine_tuning.jobs.cancel(low.id)
        server.wait(low.id, "cancelled")


def test_simulated_faults_end_the_attempt_and_not_the_server(start_server, chat_rows):
    server = start_server(*SIMULATED)
    crash = {"steps": 6, "checkpoint_steps": 2, "fault": "crash", "fault_step": 3}
    job = create(server, chat_rows, hyperparameters=crash)
    assert server.wait(job.id).status == "succeeded"
    assert any("ended by SIGKILL" in text and "step 2" in text for text in messages(server, job.id))
    job = create(server, chat_rows, hyperparameters={"steps": 6, "fault": "hang", "fault_step": 3})
    until(lambda: 3 in step_events(server, job.id))
    server.client.fine_tuning.jobs.cancel(job.id)
    assert server.wait(job.id, "cancelled").status == "cancelled"


def test_simulated_attempts_end_with_the_server_and_go_on_with_the_next(start_server, chat_rows):
    server = start_server(*SIMULATED)
    job = create(server, chat_rows, hyperparameters={"steps": 40, "step_seconds": 0.05, "checkpoint_steps": 1})
    until(lambda: len(step_events(server, job.id)) > 3)
    server.stop(signal.SIGKILL)
    again = start_server(*SIMULATED)
    assert again.wait(job.id).status == "succeeded"
    assert step_events(again, job.id) == sorted({*step_events(again, job.id)}) and step_events(again, job.id)[-1] == 40
