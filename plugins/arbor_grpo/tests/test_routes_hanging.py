"""GRPO's routes while a trainer hangs, is not there yet, or an engine does not start: each answers, and says how it is.

Nobody is asked to wait for longer than a bound; the bounds of minutes are seconds in these servers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chaos_checks import supervisors
from grpo_http import Job, call, created, group, launch, signal_worker, stop
from live import LiveServer, engine_dir, process_of
from waiting import until

HEARTBEAT = 3
IMPATIENT = "import arbor_grpo.api.calls as r; r.END_SECONDS = 1.0; r.CHECKPOINT_SECONDS = 1.0"
LOADING = "from arbor_core.inference.engines import Engines; Engines.__init__.__kwdefaults__['load_wait'] = 3.0"
BOUND = 30.0
"""No answer may take so long; the client gives up then."""


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that ends trainers which hang."""
    limits = (f"limits.heartbeat_seconds={HEARTBEAT}", "limits.attempts=9")  # a slow machine may look like a hung one
    live = launch(tmp_path_factory.mktemp("watching"), *limits)
    yield live
    stop(live)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that leaves them, and lets its clients wait for seconds in place of minutes."""
    live = launch(tmp_path_factory.mktemp("impatient"), "gpu.train=[0]", "gpu.inference=[1]", before=IMPATIENT)
    yield live
    stop(live)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server on the test's storage; the last one is ended with its jobs."""
    with ExitStack() as ending:

        def begin(*overrides: str, **more: Any) -> LiveServer:
            live = launch(tmp_path, *overrides, **more)
            ending.pop_all()
            ending.callback(stop, live)
            return live

        yield begin


def stopped(server: LiveServer, **config: Any) -> Job:
    """A job whose trainer has made a step, and hangs."""
    job = created(server, checkpoint_steps=1, **config)
    job.step()
    job.handled(1)
    signal_worker(job, signal.SIGSTOP)
    return job


def said(job: Job, text: str) -> bool:
    return any(text in event["message"] for event in job.events())


def test_row_90_terminate_ends_with_what_was_learned_before_it_hung(watching: LiveServer) -> None:
    job = stopped(watching)
    assert job.ok("terminate")["status"] == "succeeded"
    assert said(job, f"made no progress for {HEARTBEAT} seconds and was ended")
    assert job.status["policy_version"] == 1


def test_row_90_a_checkpoint_is_written_by_the_attempt_that_follows(watching: LiveServer) -> None:
    job = stopped(watching)
    named = job.ok("checkpoint", checkpoint_name="best")["checkpoints"]["best"]
    assert named["global_step"] == 1
    assert said(job, f"made no progress for {HEARTBEAT} seconds and was ended")
    job.ok("cancel")


def test_row_90_what_comes_meanwhile_is_taken_and_trained_on(watching: LiveServer) -> None:
    job = stopped(watching)
    assert job.step(group("meanwhile"))["accepted"]
    before = job.status
    assert (before["status"], before["policy_version"], before["groups"]["waiting"]) == ("running", 1, 1)
    assert job.handled(2)["policy_version"] == 2
    job.ok("cancel")


def test_row_90_cancelling_does_not_wait_for_what_hangs(watching: LiveServer) -> None:
    job = stopped(watching)
    assert job.ok("cancel")["status"] == "cancelled"


def test_row_91_another_server_ends_what_hung_before(start: Callable[..., LiveServer]) -> None:
    first = start()
    job = stopped(first)
    job.step(group("acknowledged"))
    first.stop(signal.SIGKILL)
    again = Job(start(f"limits.heartbeat_seconds={HEARTBEAT}"), job.id)
    assert again.handled(2)["policy_version"] == 2
    assert said(again, f"made no progress for {HEARTBEAT} seconds and was ended")
    assert again.step(group("acknowledged"), batch_id=1)["repeated"]
    assert again.ok("terminate")["status"] == "succeeded"


@pytest.mark.parametrize("hung", [False, True])
def test_row_92_what_was_acknowledged_is_trained_on_when_trainer_and_server_are_killed(
    start: Callable[..., LiveServer], hung: bool
) -> None:
    first = start()
    job = created(first, checkpoint_steps=1)
    job.step(group("0"), batch_id=0)
    job.handled(1)
    if hung:
        signal_worker(job, signal.SIGSTOP)
    job.step(group("1"), batch_id=1)
    job.step(group("2"), batch_id=2)
    first.process.kill()
    for supervisor in supervisors(first.storage):
        os.kill(supervisor, signal.SIGKILL)
    first.stop()
    again = Job(start(), job.id)
    assert again.step(group("1"), batch_id=1)["repeated"]
    assert again.handled(3)["policy_version"] == 3
    steps = {event["data"]["step"]: event["data"]["fed"] for event in again.events() if event["type"] == "metrics"}
    assert sorted(start for fed in steps.values() for start, _ in fed["groups"]) == [
        fed["groups"][0][0] for _, fed in sorted(steps.items())
    ]
    assert again.ok("terminate")["status"] == "succeeded"


def test_terminate_answers_how_a_job_is_that_does_not_end(impatient: LiveServer) -> None:
    job = stopped(impatient)
    begin = time.monotonic()
    assert job.ok("terminate")["status"] == "running"
    assert job.ok("terminate")["status"] == "running"
    assert time.monotonic() - begin < BOUND
    job.post("step", batch=group("late")).error(400, "invalid_job_state", "job_id")
    assert job.status["pending_batch_ids"]
    signal_worker(job, signal.SIGCONT)
    assert job.until("succeeded")["policy_version"] == 1


def test_a_checkpoint_that_does_not_come_is_told_of_and_comes_later(impatient: LiveServer) -> None:
    job = stopped(impatient)
    error = job.post("checkpoint", checkpoint_name="best", metadata={"a": 1})
    assert "comes when the job runs" in error.error(504, "checkpoint_pending")["message"]
    assert error.headers["x-should-retry"] == "false"
    assert job.status["checkpoints"] == {}
    signal_worker(job, signal.SIGCONT)
    found = until(lambda: job.status["checkpoints"])
    assert (found["best"]["global_step"], found["best"]["metadata"]) == (1, {"a": 1})
    job.ok("cancel")


def test_a_checkpoint_of_a_job_that_waits_for_a_device(impatient: LiveServer) -> None:
    first = created(impatient)
    first.until("running")
    second = created(impatient)
    second.post("checkpoint", checkpoint_name="begin").error(504, "checkpoint_pending")
    assert second.status["status"] == "created"
    first.ok("cancel")
    assert until(lambda: second.status["checkpoints"])["begin"]["global_step"] == 0
    second.ok("cancel")


def test_a_checkpoint_of_a_job_that_is_paused(impatient: LiveServer) -> None:
    job = created(impatient)
    job.until("running")
    url = f"/v1/fine_tuning/jobs/{job.id}"
    call(impatient.url, "POST", f"{url}/pause")
    job.until("paused")
    job.post("checkpoint", checkpoint_name="first").error(504, "checkpoint_pending")
    call(impatient.url, "POST", f"{url}/resume")
    until(lambda: job.status["checkpoints"])
    call(impatient.url, "POST", f"{url}/pause")
    job.until("paused")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(job.post, "checkpoint", checkpoint_name="second")
        until((job.dir / "asked" / "second.json").exists)
        job.ok("cancel")
        answer = waiting.result()
    assert (answer.status, answer.json["error"]["code"]) in [(400, "invalid_job_state"), (504, "checkpoint_pending")]


def launched(server: LiveServer, model: str, code: str) -> None:
    """Launching is refused after some time, and other requests are answered all the while."""
    with ThreadPoolExecutor(1) as pool:
        launching = pool.submit(call, server.url, "POST", "/v1/chat/launch", {"model": model})
        answered = 0
        while not launching.done():
            assert call(server.url, "GET", "/health").status == 200
            answered += not launching.done()
        assert launching.result().json["error"]["code"] == code
    assert answered > 1, "the server did nothing else"


def test_row_118_an_engine_that_hangs_while_it_loads(start: Callable[..., LiveServer]) -> None:
    server = start("engine.load_seconds=600", before=LOADING)
    launched(server, "mock/tiny", "model_loading")
    job = created(server)
    launched(server, job.id, "model_loading")
    assert job.step()["accepted"], "its groups are taken all the same"
    job.handled(1)


def test_an_engine_that_cannot_start(start: Callable[..., LiveServer]) -> None:
    server = start("engine.load_error='there is no such device'")
    for _ in range(2):
        answer = call(server.url, "POST", "/v1/chat/launch", {"model": "mock/tiny"})
        assert answer.json["error"]["code"] == "engine_unavailable"


def test_an_engine_that_hangs_is_ended_and_launched_again(start: Callable[..., LiveServer]) -> None:
    server = start("limits.engine_heartbeat_seconds=3")
    job = created(server)
    job.step()
    job.handled(1)
    assert call(server.url, "POST", "/v1/chat/launch", {"model": "mock/tiny"}).status == 200
    engine = process_of(engine_dir(server))
    os.killpg(engine, signal.SIGSTOP)
    launched(server, job.id, "engine_unavailable")
    assert until(lambda: call(server.url, "POST", "/v1/chat/launch", {"model": job.id}).status == 200)
    assert process_of(engine_dir(server)) != engine
