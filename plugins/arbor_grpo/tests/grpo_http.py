"""GRPO's routes from outside: a server with the mock trainer, and a client that says each thing in one line."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from http_calls import Answer, call
from live import LiveServer, launch
from waiting import state_of, until

GRPO = "/v1/fine_tuning/grpo"
MODEL = "mock/tiny"
ENDED = ("succeeded", "failed", "cancelled")


def item(reward: Any, answer: str = "hi", **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "say"}],
        "completion": {"role": "assistant", "content": answer},
        "reward": reward,
        **more,
    }


def group(*answers: str) -> list[dict[str, Any]]:
    """A group of two, another one for other answers."""
    return [item(0.0, *answers), item(1, *answers)]


@dataclass
class Job:
    """A job of the server's, by its id."""

    server: LiveServer
    id: str

    def post(self, path: str, **body: Any) -> Answer:
        return call(self.server.url, "POST", f"{GRPO}/{path}", {"job_id": self.id, **body})

    def ok(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.post(path, **body)
        assert answer.status == 200, answer.body
        return dict(answer.json)

    @property
    def status(self) -> dict[str, Any]:
        return self.ok("status")

    def step(self, batch: Any = None, **more: Any) -> dict[str, Any]:
        return self.ok("step", batch=group() if batch is None else batch, **more)

    def until(self, *statuses: str, seconds: float = 120) -> dict[str, Any]:
        return dict(until(lambda: (found := self.status)["status"] in statuses and found, seconds))

    def handled(self, count: int) -> dict[str, Any]:
        return dict(until(lambda: (found := self.status)["groups"]["handled"] >= count and found))

    @property
    def dir(self) -> Path:
        return self.server.storage / "jobs" / self.id

    def events(self) -> list[dict[str, Any]]:
        path = f"/v1/fine_tuning/jobs/{self.id}/events?limit=1000"
        return list(reversed(call(self.server.url, "GET", path).json["data"]))

    def sample(self, content: str = "one two three four", **more: Any) -> dict[str, Any]:
        """A chat completion of the job's model."""
        body = {"model": self.id, "messages": [{"role": "user", "content": content}], **more}
        answer = call(self.server.url, "POST", "/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        return dict(answer.json)


def created(server: LiveServer, **trainer: Any) -> Job:
    """A job whose groups have two members."""
    body = {"model": MODEL, "trainer_config": {"num_generations": 2, **trainer}}
    answer = call(server.url, "POST", f"{GRPO}/initialize", body)
    assert answer.status == 200, answer.body
    return Job(server, answer.json["job_id"])


def kill_worker(job: Job) -> None:
    """SIGKILL for the trainer's process, when it has begun."""
    signal_worker(job, signal.SIGKILL)


def signal_worker(job: Job, number: signal.Signals) -> None:
    """A signal for the trainer's process, when it has begun."""
    for pid in until(lambda: workers(job)):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def workers(job: Job) -> list[int]:
    """The processes that have the newest attempt's log open."""
    pattern = f"jobs/{job.id}/attempts/"
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            names = [os.readlink(one) for one in (folder / "fd").iterdir()]
        except OSError:
            continue
        if any(pattern in name and name.endswith("events.jsonl") for name in names):
            found.append(int(folder.name))
    return found


def stopped(job: Job) -> bool:
    """Whether every process of the trainer's stands still."""
    found = workers(job)
    return bool(found) and all(state_of(pid) == "T" for pid in found)


def stop(server: LiveServer) -> None:
    """End the jobs, then the server: trainers outlive it."""
    for job in call(server.url, "GET", "/v1/fine_tuning/jobs?limit=1000").json["data"]:
        if job["status"] not in ENDED:
            call(server.url, "POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel")
            Job(server, job["id"]).until(*ENDED)
    server.stop()


__all__ = [
    "ENDED",
    "GRPO",
    "MODEL",
    "Job",
    "call",
    "created",
    "group",
    "item",
    "kill_worker",
    "launch",
    "signal_worker",
    "stop",
    "stopped",
]
