"""Brings the jobs of the old storage into their states, on servers that `write_storage.py` has started."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from compat.calls import GRPO, JOBS, chat, get, item, learns, post, standing, state, wait_for
from live import LiveServer

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
    for n in range(12)
]
SMALL = {"r": 2, "alpha": 4}
MOCK = {
    "succeeded": {"seed": 1, "steps": 4, "checkpoint_steps": 2},
    "failed": {"seed": 2, "steps": 4, "checkpoint_steps": 1, "fault": "fail", "fault_step": 2},
    "cancelled": {"seed": 3, "steps": 100_000, "step_seconds": 0.05},
    "paused": {"seed": 4, "steps": 16, "step_seconds": 0.05, "checkpoint_steps": 4},
    "killed": {"seed": 5, "steps": 16, "step_seconds": 0.05, "checkpoint_steps": 4},
    "queued": {"seed": 6, "steps": 4, "checkpoint_steps": 2},
}
_SFT = {"batch_size": 2, "learning_rate": 0.01, "lora": SMALL, "checkpoint_steps": 2}
REAL = {
    "lora": {"seed": 1, **_SFT, "max_steps": 4},
    "full": {"seed": 2, **_SFT, "max_steps": 4, "lora": None},
    "failed": {"seed": 3, **_SFT, "max_length": 8, "too_long": "skip"},
    "cancelled": {"seed": 4, **_SFT, "n_epochs": 50, "checkpoint_steps": 1000},
    "paused": {"seed": 5, **_SFT, "max_steps": 32, "checkpoint_steps": 8, "lora": {**SMALL, "dropout": 0.1}},
    "killed": {"seed": 6, **_SFT, "max_steps": 32, "checkpoint_steps": 8, "lora": None},
    "queued": {"seed": 7, **_SFT, "max_steps": 4},
}
"""Seeds and hyperparameters, by the jobs' names."""
LEARNER: dict[str, dict[str, Any]] = {
    "mock": {"num_generations": 2, "checkpoint_steps": 1},
    "real": {"num_generations": 2, "learning_rate": 0.01, "lora_config": {"r": 2, "lora_alpha": 4}},
}


class Jobs:
    """The jobs of one storage; `ids` has them by their names."""

    def __init__(self, server: LiveServer, name: str) -> None:
        self.server, self.name = server, name
        self.base, self.table = ("mock/tiny", MOCK) if name == "mock" else ("tiny", REAL)
        self.ids: dict[str, str] = {}
        self.unrewarded: list[str] = []
        """Completions of the paused learner whose third choice has no reward yet."""
        self.file = server.upload(ROWS)  # type: ignore[arg-type]
        self.validation = server.upload(ROWS[:10])  # type: ignore[arg-type]

    def submit(self, name: str, model: str | None = None, **more: Any) -> str:
        """A job of supervised fine-tuning, by its name in the table."""
        settings = dict(self.table[name])
        body = {
            "model": model or self.base,
            "training_file": self.file,
            "seed": settings.pop("seed"),
            "suffix": name,
            "metadata": {"name": name},
            "method": {"type": "supervised", "supervised": {"hyperparameters": settings}},
        }
        return str(post(self.server, JOBS, **body, **more)["id"])

    def start(self, name: str, *until: str, model: str | None = None, **more: Any) -> str:
        job_id = self.ids[name] = self.submit(name, model, **more)
        wait_for(lambda: state(self.server, job_id) in until)
        return job_id

    def learner(self, name: str, model: str | None = None, **config: Any) -> str:
        """A job that learns from rollouts."""
        config = {**LEARNER[self.name], "seed": len(self.ids), **config}
        made = post(self.server, f"{GRPO}/initialize", model=model or self.base, suffix=name, trainer_config=config)
        self.ids[name] = made["job_id"]
        return str(made["job_id"])

    def model(self, name: str) -> str:
        return str(get(self.server, f"{JOBS}/{self.ids[name]}")["fine_tuned_model"])


def hold(server: LiveServer, job_id: str, step: int, beyond: bool = False) -> int:
    """Hold a job's worker still once it has told of the checkpoint of a step, or `beyond` it of the step after it;
    returns its process."""
    job_dir = server.storage / "jobs" / job_id
    log = job_dir / "attempts/1/events.jsonl"

    def has_told() -> bool:
        events = [json.loads(line) for line in log.read_bytes().splitlines(True) if line.endswith(b"\n")]
        kind, number = ("metrics", step + 1) if beyond else ("checkpoint", step)
        return any(event["type"] == kind and event["step"] == number for event in events)

    wait_for(log.exists, pause=0.001)
    wait_for(has_told, pause=0.001)
    keeper = int((job_dir / "attempts/1/keeper").read_text().partition(":")[0])
    worker = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
    os.kill(worker, signal.SIGSTOP)
    return worker


def pause_between(server: LiveServer, job_id: str, step: int) -> None:
    """Pause a job between two of its checkpoints."""
    worker = hold(server, job_id, step)
    post(server, f"{JOBS}/{job_id}/pause")
    wait_for(lambda: (server.storage / "jobs" / job_id / "desired").read_text() == "pause")
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: state(server, job_id) == "paused")


def hold_running(jobs: Jobs, step: int) -> None:
    """Start the job that is to be killed and hold it still when the server, too, knows of its checkpoint."""
    server, job_id = jobs.server, jobs.start("killed", "running")
    hold(server, job_id, step, beyond=True)
    wait_for(lambda: server.client.fine_tuning.jobs.checkpoints.list(job_id).data)


def cancel(server: LiveServer, job_id: str) -> None:
    wait_for(lambda: server.client.fine_tuning.jobs.list_events(job_id).data[0].type == "metrics")
    post(server, f"{JOBS}/{job_id}/cancel")
    wait_for(lambda: state(server, job_id) == "cancelled")


def send_sampled(server: LiveServer, job_id: str, label: str) -> str:
    """A group of two completions that were sampled through the server; returns the id of them and of a third one, which
    gets no reward."""
    sampled = chat(server, job_id, n=3, temperature=1.0)
    rewards = [{"completion_id": sampled.id, "index": n, "reward": float(n)} for n in range(2)]
    post(server, f"{GRPO}/rewards", job_id=job_id, group=label, rewards=rewards)
    return str(sampled.id)


def send_text(server: LiveServer, job_id: str, text: str) -> None:
    post(server, f"{GRPO}/step", job_id=job_id, batch=[item(0.0, f"not {text}"), item(1.0, text)])


def handled(server: LiveServer, job_id: str, count: int) -> None:
    wait_for(lambda: standing(server, job_id)["groups"]["handled"] >= count)


def teach(server: LiveServer, job_id: str) -> str:
    """Two steps: of a group that was sampled, whose id is returned, and of one that came as text."""
    sampled = send_sampled(server, job_id, "first")
    handled(server, job_id, 1)
    send_text(server, job_id, "second")
    handled(server, job_id, 2)
    return sampled


def unread(server: LiveServer, job_id: str) -> str:
    """Two groups while nobody reads them; returns the id of the one that was sampled."""
    sampled = send_sampled(server, job_id, "third")
    send_text(server, job_id, "fourth")
    assert standing(server, job_id)["groups"] == {"received": 4, "handled": 2, "waiting": 2}
    return sampled


def learner_done(jobs: Jobs, name: str, model: str) -> None:
    """A job that has succeeded, begun with an adapter, with a checkpoint that has a name."""
    server, job_id = jobs.server, jobs.learner(name, model)
    teach(server, job_id)
    post(server, f"{GRPO}/checkpoint", job_id=job_id, checkpoint_name="best", metadata={"score": 0.5})
    send_text(server, job_id, "third")
    handled(server, job_id, 3)
    assert post(server, f"{GRPO}/terminate", job_id=job_id)["status"] == "succeeded"


def learner_paused(jobs: Jobs, name: str, **config: Any) -> None:
    server, job_id = jobs.server, jobs.learner(name, **config)
    sampled = teach(server, job_id)
    post(server, f"{JOBS}/{job_id}/pause")
    wait_for(lambda: state(server, job_id) == "paused")
    jobs.unrewarded = [sampled, unread(server, job_id)]


def ended_or_paused(jobs: Jobs, result: str) -> None:
    """The jobs that hold no device any more, whatever their trainer."""
    server = jobs.server
    jobs.start("failed", "failed")
    cancel(server, jobs.start("cancelled", "running"))
    pause_between(server, jobs.start("paused", "running"), 4 if jobs.name == "mock" else 8)
    assert learns(server)
    learner_done(jobs, "grpo_succeeded", jobs.model(result))
    learner_paused(jobs, "grpo_paused")


def make_mock(server: LiveServer) -> Jobs:
    """All jobs of the mock trainers. Those that run are held still."""
    jobs = Jobs(server, "mock")
    jobs.start("succeeded", "succeeded", validation_file=jobs.validation)
    ended_or_paused(jobs, "succeeded")
    learning = jobs.learner("grpo_killed", max_steps=4)
    teach(server, learning)
    hold(server, learning, 2)
    hold_running(jobs, 4)
    unread(server, learning)
    jobs.start("queued", "queued")
    last = jobs.learner("grpo_queued")
    wait_for(lambda: state(server, last) == "queued")
    return jobs


def make_real(server: LiveServer) -> Jobs:
    """The same of real trainers. One job begins with an adapter that another has made, one with another's weights."""
    jobs = Jobs(server, "real")
    jobs.start("lora", "succeeded", validation_file=jobs.validation)
    jobs.start("full", "succeeded")
    ended_or_paused(jobs, "lora")
    hold_running(jobs, 8)
    jobs.start("queued", "queued", model=jobs.model("full"))
    return jobs
