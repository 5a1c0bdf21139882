"""What goes wrong around GRPO's routes: workers and servers that die. Nothing hangs, nothing is lost or done twice."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from arbor_grpo.api.calls import END_SECONDS
from grpo_http import GRPO, Job, call, created, group, kill_worker, launch, signal_worker, stop, stopped
from http_calls import Answer
from live import LiveServer
from waiting import until

from arbor_core.jobdir.groups import read
from arbor_core.jobdir.inbox import segments

BOUND = 120.0
"""No answer may take so long."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], LiveServer]]:
    """Start a server on the test's storage; the last one is ended with its jobs."""
    servers: list[LiveServer] = []

    def begin() -> LiveServer:
        servers.append(launch(tmp_path))
        return servers[-1]

    yield begin
    stop(servers[-1])


class Asking(threading.Thread):
    """A request under way."""

    def __init__(self, job: Job, path: str, **body: Any) -> None:
        super().__init__(daemon=True)
        self.ask = lambda: job.post(path, **body)
        self.answer: Answer | None = None
        self.start()

    def run(self) -> None:
        self.answer = self.ask()

    def get(self) -> Answer:
        self.join(BOUND)
        assert self.answer is not None, f"no answer in {BOUND} s"
        return self.answer


def test_a_checkpoint_survives_the_worker_that_was_to_write_it(server: LiveServer) -> None:
    job = created(server, checkpoint_steps=1, fault="hang", fault_step=1)
    job.step()
    until(lambda: stopped(job))
    asking = Asking(job, "checkpoint", checkpoint_name="best")
    until((job.dir / "asked" / "best.json").exists)
    kill_worker(job)
    answer = asking.get()
    assert (answer.status, answer.json["last_checkpoint"]) == (200, "best"), answer.body
    job.post("cancel")


def test_a_checkpoint_of_a_job_that_dies_for_good_is_refused(server: LiveServer) -> None:
    job = created(server, step_seconds=1.0, fault="fail", fault_step=1)
    job.step()
    job.until("running")
    asking = Asking(job, "checkpoint", checkpoint_name="best")
    answer = asking.get()
    if answer.status == 200:  # it came before the fault
        assert answer.json["checkpoints"]["best"]["global_step"] == 0
    else:
        answer.error(400, "invalid_job_state", "job_id")


def test_a_checkpoint_that_is_asked_for_in_the_last_step_is_the_result(server: LiveServer) -> None:
    job = created(server, max_steps=1, fault="hang", fault_step=1)
    job.step()
    until(lambda: stopped(job))  # after its only step, before it is done
    asking = Asking(job, "checkpoint", checkpoint_name="best", metadata={"a": 1})
    until((job.dir / "asked" / "best.json").exists)
    signal_worker(job, signal.SIGCONT)
    answer = asking.get()
    assert answer.status == 200, answer.body
    assert job.until("succeeded")["checkpoints"] == answer.json["checkpoints"]  # it is named just before the job ends
    assert answer.json["checkpoints"]["best"]["global_step"] == 1
    assert answer.json["checkpoints"]["best"]["metadata"] == {"a": 1}


def test_terminating_survives_the_worker(server: LiveServer) -> None:
    job = created(server, checkpoint_steps=1)
    job.until("running")
    signal_worker(job, signal.SIGSTOP)  # it is not done with them before it is killed
    job.step()
    job.step()
    asking = Asking(job, "terminate")
    until(lambda: (job.dir / "desired").read_text() == "finish")
    kill_worker(job)
    answer = asking.get()
    assert (answer.status, answer.json["status"]) == (200, "succeeded"), answer.body


def test_a_worker_that_is_killed_again_and_again_is_reported(server: LiveServer) -> None:
    job = created(server, fault="crash", fault_step=0, fault_times=99)
    status = job.until("failed")
    assert status["error"]["code"] == "worker_crashed"
    begin = time.monotonic()
    job.post("step", batch=group()).error(400, "invalid_job_state", "job_id")
    job.post("terminate").error(400, "invalid_job_state", "job_id")
    assert time.monotonic() - begin < END_SECONDS, "nobody waits for the end of what has ended"


def test_row_89_a_worker_may_be_killed_ever_again_while_it_gets_on(server: LiveServer) -> None:
    """More often than a job may crash without progress, and without any checkpoint."""
    job = created(server)
    for number in range(1, 5):
        job.step(group(str(number)))
        until(lambda count=number: job.status["policy_version"] == count)
        kill_worker(job)
        until(lambda count=number: sum("training process died" in event["message"] for event in job.events()) == count)
    assert job.ok("terminate")["policy_version"] == 4


def test_row_89_steps_are_taken_while_no_worker_runs(server: LiveServer) -> None:
    job = created(server, fault="crash", fault_step=1, checkpoint_steps=1)
    for number in range(4):
        until(lambda: job.status["pending_batch_ids"])
        job.step(group(f"{number}"))
    job.handled(4)
    steps = [event["data"] for event in job.events() if event["type"] == "metrics"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert len({start for step in steps for start, _ in step["fed"]["groups"]}) == 4
    job.post("cancel")


def test_pausing_and_resuming_keeps_what_waits(server: LiveServer) -> None:
    job = created(server)
    url = f"/v1/fine_tuning/jobs/{job.id}"
    job.until("running")
    call(server.url, "POST", f"{url}/pause")
    job.until("paused")
    assert job.step(batch_id=0)["accepted"]
    call(server.url, "POST", f"{url}/resume")
    job.handled(1)
    job.post("cancel")


def test_another_server_offers_what_the_first_did_not(start: Callable[[], LiveServer]) -> None:
    first = start()
    job = created(first)
    job.step(group("a"), batch_id=0)
    job.handled(1)
    before = job.status
    assert before["pending_batch_ids"] == [1, 2]
    job.step(group("b"), batch_id=2)
    first.stop()
    again = Job(start(), job.id)
    after = again.handled(2)
    assert not {0, 2} & set(after["pending_batch_ids"])
    assert len(after["pending_batch_ids"]) == 2
    repeated = again.step(group("a"), batch_id=0)
    assert (repeated["repeated"], repeated["tokenized"]) == (True, 2)
    again.post("step", batch=group("b"), batch_id=0).error(400, "batch_id_reuse", "batch_id")
    assert again.step(group("c"), batch_id=1)["repeated"] is False, "offered by the server that is gone"


@pytest.mark.parametrize("point", ["inbox.written", "inbox.synced"])
def test_row_91_a_server_that_dies_with_a_group_in_its_hands(tmp_path: Path, point: str) -> None:
    """What was answered is there; what was not may be sent again."""
    first = launch(tmp_path, env={"ARBOR_CRASH_AT": point})
    job = created(first)
    job.until("running")
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        job.step(batch_id=0)
    assert first.process.wait(120) == -signal.SIGKILL
    second = launch(tmp_path)
    try:
        again = Job(second, job.id)
        answer = again.step(batch_id=0)
        assert answer["batch_id"] == 0
        again.handled(1)
        assert len(list(read(again.dir / "inbox", 0))) == 1
        assert again.status["groups"]["received"] == 1
    finally:
        stop(second)


def test_a_damaged_inbox_is_an_error_of_the_server_that_does_not_say_where(tmp_path: Path) -> None:
    first = launch(tmp_path)
    job = created(first)
    job.step()
    job.handled(1)
    first.stop(signal.SIGKILL)
    ((_, segment),) = segments(job.dir / "inbox")
    content = segment.read_bytes()
    segment.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    second = launch(tmp_path)
    try:
        again = Job(second, job.id)
        for path, body in (("status", {}), ("step", {"batch": group("a")})):
            message = again.post(path, **body).error(500, "storage_damaged")["message"]
            assert str(tmp_path) not in message
        assert f"jobs/{job.id}/inbox in the storage directory is damaged" in second.log
        segment.write_bytes(content)
        assert again.status["groups"]["received"] == 1
    finally:
        stop(second)


def test_the_device_of_a_terminated_job_is_free(tmp_path: Path) -> None:
    live = launch(tmp_path, "gpu.train=[0]", "gpu.inference=[1]")
    try:
        first = created(live)
        first.until("running")
        second = created(live)
        first.step()
        first.handled(1)
        assert second.status["status"] == "created"
        first.ok("terminate")
        second.until("running")
        assert first.sample()["choices"], "the first one's model goes on answering"
    finally:
        stop(live)


def test_new_completions_come_from_the_newest_policy(server: LiveServer) -> None:
    job = created(server)
    words = " ".join(f"word{number}" for number in range(12))
    said = []
    for version in range(3):
        until(lambda: job.status["policy_version"] == version)  # noqa: B023 - called at once
        said.append(job.sample(words)["choices"][0]["message"]["content"])
        assert job.sample(words)["choices"][0]["message"]["content"] == said[-1]
        job.step(group(f"{version}"))
    assert len(set(said)) == 3
    job.post("cancel")


def test_over_supply_is_told_to_wait(server: LiveServer) -> None:
    job = created(server)
    job.until("running")
    call(server.url, "POST", f"/v1/fine_tuning/jobs/{job.id}/pause")
    job.until("paused")
    answers = [job.post("step", batch=group(f"{number}")) for number in range(260)]
    assert {answer.status for answer in answers[:258]} == {200}
    answers[-1].error(429, "rollouts_queue_full")
    assert answers[-1].headers["retry-after"] == "1"
    job.post("cancel")


def test_a_client_that_waits_hears_of_a_step(server: LiveServer) -> None:
    job = created(server, max_staleness=0)
    known = job.until("running")["pending_batch_ids"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(job.ok, "status", wait=60, known=known)
        job.step()
        seen = waiting.result()
    assert seen["policy_version"] == 1
    assert set(seen["pending_batch_ids"]) - set(known)
    job.post("cancel")


def test_offers_expire(server: LiveServer) -> None:
    job = created(server, offer_seconds=0.2)
    first = set(job.status["pending_batch_ids"])
    fresh = until(lambda: set(job.status["pending_batch_ids"]) - first)
    assert job.step(batch_id=min(fresh))["accepted"]
    job.post("cancel")


@pytest.mark.parametrize(("staleness", "offered"), [(0, 1), (1, 2)])
def test_credits(server: LiveServer, staleness: int, offered: int) -> None:
    job = created(server, max_staleness=staleness)
    assert len(job.status["pending_batch_ids"]) == offered
    job.step()
    job.handled(1)
    assert len(job.status["pending_batch_ids"]) == offered
    job.post("cancel")


def test_row_87_what_is_too_old_is_taken_and_skipped(server: LiveServer) -> None:
    job = created(server, max_group_age=0, fault="hang", fault_step=0)
    until(lambda: stopped(job))  # until all are there
    for number in range(3):
        assert job.step(group(f"{number}"))["accepted"]
    signal_worker(job, signal.SIGCONT)
    job.handled(3)
    skipped = [event["data"]["fed"]["skipped"] for event in job.events() if event["type"] == "metrics"]
    assert sum(map(len, skipped)) <= 2
    assert len(skipped) < 3, "sampled before the first step, and too old after it"
    job.post("cancel")


def test_who_asks_for_another_ones_job_hears_that_there_is_none(tmp_path: Path) -> None:
    keys = "auth.keys=[{name:ann,key:sk-of-ann-0123,scopes:[train]},{name:bob,key:sk-of-bob-0123,scopes:[train]}]"
    live = launch(tmp_path, keys)
    ann, bob = ({"authorization": f"Bearer sk-of-{name}-0123"} for name in ("ann", "bob"))
    try:
        body = {"model": "mock/tiny", "trainer_config": {"num_generations": 2}}
        made = call(live.url, "POST", f"{GRPO}/initialize", body, ann)
        job_id = made.json["job_id"]
        for path in ("status", "terminate", "cancel"):
            refused = call(live.url, "POST", f"{GRPO}/{path}", {"job_id": job_id}, bob)
            refused.error(404, "fine_tune_not_found", "fine_tune_id")
        call(live.url, "POST", f"{GRPO}/status", b"", bob).error(400, "invalid_job_state", "job_id")
        assert call(live.url, "POST", f"{GRPO}/cancel", {"job_id": job_id}, ann).status == 200
    finally:
        live.stop()
