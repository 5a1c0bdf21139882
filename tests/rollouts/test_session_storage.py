"""Full disks while a job learns from rollouts: what cannot be kept is refused or waits, and nothing fails for it.

A full disk is a small file system in memory; where it cannot be mounted, these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_rollouts import GRPO, by_ids
from disks import fill
from http_calls import JOBS, Answer, call
from jobs import check_and_stop, go_on, hanging, stopped
from live import LiveServer
from waiting import until

from arbor_core.jobdir import groups

pytest.importorskip("arbor_grpo", reason="brings the routes")

LONG = "word " * 700
"""More than what is left of a page."""


class Pupil:
    """A job of the mock trainer on a server whose disk can be filled."""

    def __init__(self, server: LiveServer, **config: Any) -> None:
        self.server = server
        body = {"model": "mock/tiny", "trainer_config": {"num_generations": 2, **config}}
        self.id = call(server.url, "POST", f"{GRPO}/initialize", body).json["job_id"]
        self.dir = server.storage / "jobs" / self.id

    def post(self, path: str, **body: Any) -> Answer:
        return call(self.server.url, "POST", f"{GRPO}/{path}", {"job_id": self.id, **body})

    def sample(self, content: str) -> dict[str, Any]:
        said = [{"role": "user", "content": content}]
        body = {"model": self.id, "messages": said, "n": 2, "max_tokens": 8}
        answer = call(self.server.url, "POST", "/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        return dict(answer.json)

    def until(self, *statuses: str) -> dict[str, Any]:
        return dict(until(lambda: (found := self.post("status").json)["status"] in statuses and found))

    def handled(self, count: int) -> None:
        until(lambda: self.post("status").json["groups"]["handled"] == count)

    def steps(self) -> list[int]:
        events = call(self.server.url, "GET", f"{JOBS}/{self.id}/events?limit=100").json["data"]
        return [event["data"]["step"] for event in reversed(events) if event["type"] == "metrics"]

    def end(self) -> None:
        assert self.post("terminate").json["status"] == "succeeded", self.server.log
        check_and_stop(self.server)


def text(word: str = LONG) -> list[dict[str, Any]]:
    said = [{"role": "user", "content": "say"}]
    return [{"messages": said, "completion": {"role": "assistant", "content": word}, "reward": n} for n in (0, 1)]


@pytest.fixture
def server(small_disk: Path, start_server: Callable[..., LiveServer]) -> Iterator[LiveServer]:
    live = start_server("limits.free_bytes=0", storage=small_disk)
    yield live
    (small_disk / "ballast").unlink(missing_ok=True)
    if live.process.poll() is None:
        live.cancel_all()


def test_a_group_for_which_there_is_no_room_is_refused_and_taken_later(server: LiveServer, small_disk: Path) -> None:
    job = Pupil(server, checkpoint_steps=1)
    job.until("running")
    assert job.post("step", batch=text("short"), batch_id=0).status == 200
    job.handled(1)
    ballast = fill(small_disk)
    for _ in range(2):
        refused = job.post("step", batch=text(), batch_id=1)
        refused.error(507, "insufficient_storage")
        assert refused.headers["x-should-retry"] == "false"
    status = job.post("status").json
    assert (status["groups"]["received"], 1 in status["pending_batch_ids"]) == (1, True)
    job.post("checkpoint", checkpoint_name="best", metadata={"why": LONG}).error(507, "insufficient_storage")
    ballast.unlink()
    taken = job.post("step", batch=text(), batch_id=1).json
    assert (taken["batch_id"], taken["repeated"]) == (1, False)
    assert "best" in job.post("checkpoint", checkpoint_name="best", metadata={"why": LONG}).json["checkpoints"]
    job.handled(2)
    assert [record.group.id for record in groups.read(job.dir / "inbox", 0)] == [0, 1]
    assert job.steps() == [1, 2]
    job.end()


def test_a_policy_for_which_there_is_no_room_pauses_the_job(server: LiveServer, small_disk: Path) -> None:
    job = Pupil(server, checkpoint_steps=1, **hanging(1))
    assert job.post("step", batch=text(), batch_id=0).status == 200
    until(lambda: stopped(server, job.id))
    job.handled(1)
    assert job.post("step", batch=text(), batch_id=1).status == 200
    ballast = fill(small_disk)
    go_on(server, job.id)
    until(lambda: not (job.dir / "attempts" / "1" / "work").exists())
    assert job.post("status").json["status"] == "running", "it cannot even say that it is paused"
    ballast.unlink()
    job.until("paused")
    assert job.post("status").json["error"] is None
    assert call(server.url, "POST", f"{JOBS}/{job.id}/resume").status == 200
    job.handled(2)
    assert job.steps()[-1] == 2
    job.end()


def test_a_completion_for_which_there_is_no_room_is_answered_and_cannot_be_rewarded(
    server: LiveServer,
    small_disk: Path,
) -> None:
    job = Pupil(server)
    job.until("running")
    before = job.sample("before")
    ballast = fill(small_disk)
    unknown = by_ids(job.sample(LONG))
    job.post("rewards", rewards=unknown, group="unknown").error(400, "unknown_completion", "rewards[0].completion_id")
    ballast.unlink()
    job.post("rewards", rewards=unknown, group="unknown").error(400, "unknown_completion", "rewards[0].completion_id")
    assert job.post("rewards", rewards=by_ids(before), group="before").json["matched"] == 2
    assert job.post("rewards", rewards=by_ids(job.sample(LONG)), group="after").json["matched"] == 2
    job.handled(2)
    job.end()
