"""A client that teaches one job in the chaos: it samples, rewards, repeats itself, hangs up, and asks for checkpoints.

It behaves as clients should: what it got no answer to, it sends again as it was. What it was told is compared with what
is left at the end (`chaos_checks.of_lessons`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos_checks import of_lesson
from chaos_jobs import REFUSED_LATE, RETRY_SECONDS, JobClient
from http_calls import Answer
from live import ENDED

if TYPE_CHECKING:
    from chaos_clients import Clients, Kind

GRPO = "/v1/fine_tuning/grpo"
LEARNING: list[Kind] = [
    (
        "mock_grpo",
        {"num_generations": 4, "groups_per_step": 2, "step_seconds": 0.05, "checkpoint_steps": 5, "max_group_age": 64},
    ),
    ("mock_grpo", {"num_generations": 4, "groups_per_step": 1, "max_staleness": 2, "resume_seconds": 0}),
]
LEARNING_REAL: list[Kind] = [
    (
        "grpo",
        {
            "num_generations": 4,
            "groups_per_step": 2,
            "max_group_age": 64,
            "lora": {"r": 4, "alpha": 8},
            "learning_rate": 1e-3,
            "checkpoint_steps": 4,
            "keep_checkpoints": 2,
        },
    ),
]
STEPS = (8, 25)
"""A lesson has so many steps at least and at most."""
NAMES = ("best", "of-the-day", "v1.0")


@dataclass
class Told:
    """What the server has acknowledged."""

    groups: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """By batch id: the completions, or nothing where the group was sent as text."""
    names: set[str] = field(default_factory=set)
    """Of checkpoints."""
    version: int = 0
    """Newest version of the policy that was answered."""


class Lesson(JobClient):
    """Teaches a job until it has made its steps, was cancelled by somebody, or `hurry` is set."""

    def __init__(self, clients: Clients, job_id: str, size: int, seed: int) -> None:
        super().__init__(clients, job_id, seed)
        self.size = size
        self.steps = self.draw.randint(*STEPS)
        self.told = Told()
        self.sent = 0

    def work(self) -> None:
        while (status := self.post("status")) is None or status.json["status"] not in ENDED:
            self.act(status)

    def violations(self, storage: Path) -> Iterator[str]:
        return of_lesson(storage, self.job_id, self.told, self.clients.counts)

    def act(self, status: Answer | None) -> None:
        """One thing after a look at how the job stands."""
        if status is None:
            self.rest.wait(RETRY_SECONDS)
            return
        pending = status.json["pending_batch_ids"]
        self.told.version = max(self.told.version, status.json["policy_version"])
        if again := self.told.groups.keys() & set(pending):
            self.fault(f"batch ids {sorted(again)} are offered again")
        if self.hurry.is_set() or status.json["policy_version"] >= self.steps:
            self.post("terminate")
        elif self.draw.random() < 0.05:
            self.name_checkpoint()
        elif pending:
            self.teach(self.draw.choice(pending))
        else:
            self.rest.wait(0.05)

    def post(self, path: str, **body: Any) -> Answer | None:
        answer = self.clients.ask("POST", f"{GRPO}/{path}", {"job_id": self.job_id, **body})
        if answer and answer.status in (200, 507):
            return answer if answer.status == 200 else None
        if answer and not (answer.status == 400 and answer.json["error"]["code"] == REFUSED_LATE):
            self.fault(f"{path} was answered {answer.status}: {answer.body[:300]!r}")
        return None

    def name_checkpoint(self) -> None:
        name = self.draw.choice(NAMES)
        answer = self.post("checkpoint", checkpoint_name=name, metadata={"sent": self.sent})
        if answer:
            self.told.names.add(name)
            self.clients.counts["checkpoints named"] += 1

    # --- groups -------------------------------------------------------------------------------------------------------

    def teach(self, batch_id: int) -> None:
        """Sample a group, reward it, and send it until somebody says what became of it."""
        said = [{"role": "user", "content": f"{self.draw.choice('abcdef')} word {self.draw.randrange(1 << 30)}"}]
        body = {"model": self.job_id, "messages": said, "n": self.size, "max_tokens": 12}
        sampled = self.clients.ask("POST", "/v1/chat/completions", body)
        if sampled is None or sampled.status != 200:
            self.rest.wait(RETRY_SECONDS)
            return
        self.sent += 1
        if self.draw.random() < 0.2:
            self.send("step", batch_id, (), batch=as_text(said, sampled.json))
        else:
            names = tuple(name_of(sampled.json["id"], choice["index"]) for choice in sampled.json["choices"])
            self.send("rewards", batch_id, names, group=f"question {self.sent}", rewards=by_ids(sampled.json))

    def send(self, path: str, batch_id: int, names: tuple[str, ...], **body: Any) -> None:
        body["batch_id"] = batch_id
        manner = self.draw.random()
        if manner < 0.15:
            self.hang_up(f"{GRPO}/{path}", {"job_id": self.job_id, **body})
        answer = self.delivered(path, body)
        if answer is None:
            return
        self.told.groups[batch_id] = names
        self.clients.counts["groups taken"] += 1
        self.clients.counts["groups that had come before"] += answer["repeated"]
        if answer["matched"] != self.size and not self.clients.lossy:
            self.fault(f"batch {batch_id}: {answer['matched']} of {self.size} completions were found")
        if manner > 0.85 and (again := self.delivered(path, body)) and not again["repeated"]:
            self.fault(f"batch {batch_id} was taken twice")

    def delivered(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a group; None: the job has ended, or on a full disk its completions were never written down."""
        while True:
            answer = self.clients.ask("POST", f"{GRPO}/{path}", {"job_id": self.job_id, **body})
            if answer and answer.status == 200:
                return dict(answer.json) if answer.json["accepted"] else None
            if answer and answer.status != 507:
                code = answer.json["error"]["code"]
                if code != REFUSED_LATE and not (code == "unknown_completion" and self.clients.lossy):
                    self.fault(f"{path} of batch {body['batch_id']}: {answer.status}: {answer.body[:300]!r}")
                return None
            self.rest.wait(RETRY_SECONDS)


def name_of(completion: str, index: int) -> str:
    """A choice as the inbox names it."""
    return f"{completion}#{index}" if index else completion


def worth(text: str, index: int) -> float:
    return float(text.count("e") + index % 2)


def by_ids(sampled: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "completion_id": sampled["id"],
            "index": choice["index"],
            "reward": worth(choice["message"]["content"], choice["index"]),
        }
        for choice in sampled["choices"]
    ]


def as_text(said: list[dict[str, Any]], sampled: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "messages": said,
            "completion": {"role": "assistant", "content": choice["message"]["content"]},
            "reward": worth(choice["message"]["content"], choice["index"]),
        }
        for choice in sampled["choices"]
    ]
