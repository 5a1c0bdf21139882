"""Attempts that run on another machine: the server knows of them what their executor says, and nothing else.

`row_N` as in docs/faults.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from crash import REMOTE, check_the_rest
from http_calls import call
from jobs import create, events, go_on, hanging, held, messages, step_events, stopped
from live import LiveServer
from waiting import until

from arbor_core.testing.invariants import Seen, processes

STEADY = {"steps": 60, "step_seconds": 0.05, "checkpoint_steps": 5}


def node(server: LiveServer) -> int:
    """The process that simulates the machine."""
    return next(pid for pid, words in processes(server.storage).items() if "arbor_mock.node" in words)


def claims(server: LiveServer) -> list[Path]:
    """What supervisors of this machine would have written."""
    return list(server.storage.glob("jobs/*/attempts/*/keeper"))


def test_a_job_runs_on_another_machine(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server(*REMOTE)
    seen = Seen(server.storage)
    job = create(server, chat_rows, hyperparameters={"steps": 5})
    assert server.wait(job.id).status == "succeeded"
    assert step_events(server, job.id) == [1, 2, 3, 4, 5]
    started = next(event for event in events(server, job.id) if "started" in event.message)
    assert started.data == {"devices": ["mock:0"], "node": "mock-node"}
    devices = call(server.url, "GET", "/v1/arbor/devices").json["data"]
    assert {pool: device["node"] for device in devices for pool in device["pools"]} == {
        "train": "mock-node",
        "engine": None,
    }
    assert not claims(server)
    check_the_rest(server, seen)


def test_row_141_it_outlives_the_server_and_is_found_again_by_one_with_this_executor(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server(*REMOTE)
    job = create(server, chat_rows, hyperparameters=hanging(5, **STEADY))
    until(lambda: stopped(server, job.id))
    machine = node(server)
    server.stop(signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"1 job\(s\) run with executor=mock_node, which executor=local cannot find"):
        start_server()
    again = start_server(*REMOTE)
    assert node(again) == machine
    go_on(again, job.id)
    assert again.wait(job.id).status == "succeeded"
    assert step_events(again, job.id) == list(range(1, 61))
    assert not list(again.storage.glob(f"jobs/{job.id}/attempts/2"))
    check_the_rest(again, Seen(again.storage))


def test_row_139_a_machine_that_dies_takes_its_attempts_along_and_they_are_tried_again(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server(*REMOTE)
    seen = Seen(server.storage)
    job = create(server, chat_rows, hyperparameters=hanging(13, **STEADY))
    until(lambda: stopped(server, job.id))
    os.kill(node(server), signal.SIGKILL)
    assert server.wait(job.id).status == "succeeded"
    assert any(
        "its supervisor was lost); attempt 2 starts from the checkpoint" in text for text in messages(server, job.id)
    )
    check_the_rest(server, seen)


@pytest.mark.slow
def test_row_139_a_machine_that_dies_while_no_server_runs_has_lost_its_attempts_too(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server(*REMOTE)
    job = create(server, chat_rows, hyperparameters=hanging(13, **STEADY))
    until(lambda: stopped(server, job.id))
    machine = node(server)
    server.stop(signal.SIGKILL)
    os.kill(machine, signal.SIGKILL)
    again = start_server(*REMOTE)
    assert again.wait(job.id).status == "succeeded"
    assert max(step_events(again, job.id)) == 60
    check_the_rest(again, Seen(again.storage))


@pytest.mark.slow
def test_row_140_a_machine_that_does_not_answer_loses_nothing(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    """Its workers train on meanwhile, and their events are taken. Only a warning says so."""
    server = start_server(
        *REMOTE, "limits.heartbeat_seconds=3", before="import arbor_core.dispatch.monitor as m; m.POLL_SECONDS=0.2"
    )
    job = create(server, chat_rows, hyperparameters=STEADY)
    until(lambda: len(step_events(server, job.id)) > 3)
    os.kill(machine := node(server), signal.SIGSTOP)
    until(lambda: server.log.count("cannot say which of 1 attempts live") > 3)
    until(lambda: max(step_events(server, job.id)) == 60)
    os.kill(machine, signal.SIGCONT)
    assert server.wait(job.id).status == "succeeded"
    warnings = [event.message for event in events(server, job.id) if event.level != "info"]
    assert [text for text in warnings if "its machine does not answer" not in text] == []
    check_the_rest(server, Seen(server.storage))


@pytest.mark.slow
def test_row_140_a_machine_that_stands_still_keeps_its_attempts_until_it_answers(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    """Neither the job's hang nor its cancellation ends what nobody can see; then all goes on, or ends."""
    server = start_server(
        *REMOTE, "limits.heartbeat_seconds=2", before="import arbor_core.dispatch.monitor as m; m.POLL_SECONDS=0.2"
    )
    going_on, cancelled = (create(server, chat_rows, hyperparameters={**STEADY, "steps": 200}) for _ in range(2))
    until(lambda: all(len(step_events(server, job.id)) > 3 for job in (going_on, cancelled)))
    machine = node(server)
    still = [pid for pid in processes(server.storage) if pid not in (server.process.pid, machine)]
    for pid in (*still, machine):
        os.kill(pid, signal.SIGSTOP)
    for job in (going_on, cancelled):
        until(lambda job=job: any("its machine does not answer" in text for text in messages(server, job.id)))
    server.client.fine_tuning.jobs.cancel(cancelled.id)
    rounds = server.log.count("cannot say which of 2 attempts live")
    until(lambda: server.log.count("cannot say which of 2 attempts live") > rounds + 5)
    for job in (going_on, cancelled):
        assert server.client.fine_tuning.jobs.retrieve(job.id).status == "running"
    assert held(server) == 2
    for pid in (machine, *still):
        with suppress(ProcessLookupError):  # the server has ended its template, which did not answer either
            os.kill(pid, signal.SIGCONT)
    assert server.wait(going_on.id).status == "succeeded"
    assert server.wait(cancelled.id, "cancelled")
    assert step_events(server, going_on.id) == list(range(1, 201))
    for job in (going_on, cancelled):
        assert not list(server.storage.glob(f"jobs/{job.id}/attempts/2"))
    check_the_rest(server, Seen(server.storage))


@pytest.mark.slow
def test_a_remote_trainer_that_hangs_is_ended_by_what_its_executor_says(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server(*REMOTE, "limits.heartbeat_seconds=2")
    hang = {"steps": 6, "step_seconds": 0.05, "checkpoint_steps": 2, "fault": "hang", "fault_step": 4}
    job = create(server, chat_rows, hyperparameters=hang)
    assert server.wait(job.id).status == "succeeded"
    said = messages(server, job.id)
    assert any("made no progress for 2 seconds" in text and "checkpoint at step 4" in text for text in said), said
    check_the_rest(server, Seen(server.storage))


@pytest.mark.slow
def test_a_remote_job_is_paused_and_cancelled(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server(*REMOTE)
    client = server.new_client(_strict_response_validation=False)
    job = create(server, chat_rows, hyperparameters={**STEADY, "steps": 9999})
    until(lambda: len(step_events(server, job.id)) > 3)
    client.fine_tuning.jobs.pause(job.id)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
    client.fine_tuning.jobs.resume(job.id)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
    client.fine_tuning.jobs.cancel(job.id)
    assert server.wait(job.id, "cancelled").status == "cancelled"
    check_the_rest(server, Seen(server.storage))
