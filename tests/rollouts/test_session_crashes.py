"""The crash matrix of learning from rollouts: a server, or the process that trains, dies between any two side effects.

A client teaches a job all the while and repeats what it got no answer to. Whoever dies: each group that it sent is in
the inbox once, batch ids that were used are not offered again, the checkpoint that it named is there, and after the
job's end nothing is left that only served while it learned. Some points run always; all of them with `make crash`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chaos_checks import of_forgotten, of_lesson
from chaos_rollouts import GRPO, Told, by_ids, name_of
from crash import (
    DIRECT,
    DIRECT_ALWAYS,
    DIRECT_SERVER,
    SEGMENTS,
    SESSION_SERVER,
    SESSION_SERVER_ALWAYS,
    SESSION_WORKERS,
    SESSION_WORKERS_ALWAYS,
    CrashClient,
    marked,
)
from http_calls import call
from live import ENDED, LiveServer

from arbor_core.jobdir import checkpoints, groups, samples
from arbor_core.rollouts.completion_ledger import Ledger
from arbor_core.testing.invariants import Seen

pytest.importorskip("arbor_grpo", reason="brings the routes")

STEPS, SIZE = 4, 2


@dataclass
class Pupil(CrashClient):
    """Teaches one job."""

    job_id: str = ""
    told: Told = field(default_factory=Told)
    questions: int = 0

    def good(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.ask("POST", path, body, again=(503,))  # an engine that is starting
        assert answer.status == 200, answer.body
        return dict(answer.json)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        return self.good(f"{GRPO}/{path}", {"job_id": self.job_id, **body})

    def begin(self) -> None:
        config = {"num_generations": SIZE, "checkpoint_steps": 2, "max_group_age": 64}
        self.job_id = self.good(f"{GRPO}/initialize", {"model": "mock/tiny", "trainer_config": config})["job_id"]

    def teach(self) -> None:
        """One group, by the ids of its completions or as text; the same request again changes nothing."""
        batch_id = self.credit()
        self.questions += 1
        said = [{"role": "user", "content": f"question {self.questions}"}]
        body = {"model": self.job_id, "messages": said, "n": SIZE, "max_tokens": 8}
        sampled = self.good("/v1/chat/completions", body)
        group = {"batch_id": batch_id, "group": f"group {self.questions}", "rewards": by_ids(sampled)}
        first = self.post("rewards", **group)
        assert (first["batch_id"], first["matched"]) == (batch_id, SIZE)
        again = self.post("rewards", **group)
        assert (again["batch_id"], again["repeated"]) == (batch_id, True)
        self.told.groups[batch_id] = tuple(name_of(sampled["id"], choice["index"]) for choice in sampled["choices"])

    def credit(self) -> int:
        deadline = time.monotonic() + 120
        while True:
            offered = set(self.post("status")["pending_batch_ids"])
            assert not offered & self.told.groups.keys(), "a batch id that was used is offered again"
            if offered:
                return min(offered)
            assert time.monotonic() < deadline, self.server.log

    def name(self, name: str) -> None:
        answer = self.post("checkpoint", checkpoint_name=name)
        assert name in answer["checkpoints"]
        self.told.names.add(name)

    def play(self) -> None:
        """From the first question to the end, with a checkpoint that gets a name on the way."""
        self.begin()
        for number in range(STEPS):
            self.teach()
            if number == 1:
                self.name("half-way")
        deadline = time.monotonic() + 120
        while (status := self.post("status"))["groups"]["handled"] < STEPS:
            assert time.monotonic() < deadline, (status, self.server.log)
        while (status := self.post("terminate"))["status"] not in ENDED:
            assert time.monotonic() < deadline, (status, self.server.log)
        assert status["status"] == "succeeded", status

    def check(self) -> None:
        """Nothing of what it was told was lost, and nothing is left behind."""
        storage = self.server.storage
        assert list(of_lesson(storage, self.job_id, self.told, Counter())) == []
        assert list(of_forgotten(storage)) == []
        named = storage / "jobs" / self.job_id / "checkpoints" / checkpoints.NAMED / "half-way"
        assert checkpoints.fault(named.resolve()) is None
        assert len(list(groups.read(storage / "jobs" / self.job_id / "inbox", 0))) == STEPS
        page = call(self.server.url, "GET", f"/v1/arbor/jobs/{self.job_id}/samples?limit=100").json["data"]
        assert Counter(sample["batch_id"] for sample in page) == dict.fromkeys(self.told.groups, SIZE)
        assert sorted(sample["step"] for sample in page) == sorted([*range(1, STEPS + 1)] * SIZE)


@pytest.mark.parametrize("point", marked(SESSION_SERVER_ALWAYS, SESSION_SERVER))
def test_a_server_that_dies_at(point: str, start_server: Callable[..., LiveServer]) -> None:
    first = start_server(env={"ARBOR_CRASH_AT": point})
    seen = Seen(first.storage)
    pupil = Pupil(first, start_server)
    pupil.play()
    if point.startswith("forgotten."):
        assert first.process.wait(120) == -signal.SIGKILL, f"the server never came to {point}"
        pupil.server = start_server()
    assert pupil.server is not first, f"the server never came to {point}"
    pupil.finished(seen)


@pytest.mark.parametrize("point", marked(SESSION_WORKERS_ALWAYS, SESSION_WORKERS))
def test_a_trainer_that_dies_at(point: str, start_server: Callable[..., LiveServer], tmp_path: Path) -> None:
    once = tmp_path / "died"
    server = start_server(env={"ARBOR_CRASH_BELOW": point, "ARBOR_CRASH_ONCE": str(once)})
    seen = Seen(server.storage)
    pupil = Pupil(server, start_server)
    pupil.play()
    assert once.exists(), f"no process came to {point}"
    pupil.finished(seen)


TWO_DEVICES = ("inference=mock_direct", "gpu.inference=[4,5]")
"""Each engine takes a share of both; a model may have two engines, and policies come from the trainer's memory."""


@pytest.mark.parametrize("point", marked(DIRECT_ALWAYS, DIRECT))
def test_a_trainer_that_sends_or_an_engine_that_fetches_dies_at(
    point: str, start_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    once = tmp_path / "died"
    server = start_server(*TWO_DEVICES, env={"ARBOR_CRASH_BELOW": point, "ARBOR_CRASH_ONCE": str(once)})
    seen = Seen(server.storage)
    pupil = Pupil(server, lambda: start_server(*TWO_DEVICES))
    pupil.play()
    assert once.exists(), f"no process came to {point}"
    assert not list(server.storage.glob("jobs/*/weights/*")), "policies are no files here"
    pupil.finished(seen)


@pytest.mark.parametrize("point", marked([], DIRECT_SERVER))
def test_a_server_whose_engines_fetch_dies_at(point: str, start_server: Callable[..., LiveServer]) -> None:
    first = start_server(*TWO_DEVICES, env={"ARBOR_CRASH_AT": point})
    seen = Seen(first.storage)
    pupil = Pupil(first, lambda: start_server(*TWO_DEVICES))
    pupil.play()
    assert pupil.server is not first, f"the server never came to {point}"
    pupil.finished(seen)


WRITING = """
import sys
from pathlib import Path
from arbor_core.jobdir.groups import entry, read
from arbor_core.jobdir.inbox import Inbox
from arbor_core.jobdir.samples import SampleLog, sampled
from arbor_core.types import Completion, Group, Rollout
from arbor_core.rollouts.completion_ledger import Ledger

box = Inbox(Path(sys.argv[1]) / "inbox", segment_bytes=1)
ledger = Ledger(Path(sys.argv[1]) / "ledger", segment_bytes=1, max_segments=9)
for n in range(int(sys.argv[2]), 4):
    box.append([entry(Group(id=n, rollouts=(Rollout(reward=1.0),), version=0), n)])
    ledger.add(Completion(id=f"c{n}", version=0, prompt=b"", tokens=b"", logprobs=b"", temperature=1.0, key=b"k"))
samples = SampleLog(Path(sys.argv[1]) / "samples", segment_bytes=1, max_segments=2)
for number, record in enumerate(read(Path(sys.argv[1]) / "inbox", 0), 1):
    samples.add(sampled(record, step=number))
"""


@pytest.mark.parametrize("point", SEGMENTS)
def test_a_server_that_dies_between_two_segments(point: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITING, str(tmp_path)]
    died = subprocess.run([*command, "0"], env={**os.environ, "ARBOR_CRASH_AT": point}, check=False)
    assert died.returncode == -signal.SIGKILL
    there = [record.group.id for record in groups.read(tmp_path / "inbox", 0)]
    assert there == list(range(len(there)))
    ledger = Ledger(tmp_path / "ledger")
    assert {id for id, _ in ledger.places} >= {f"c{n}" for n in there[:-1]}  # noqa: A001
    ledger.close()
    subprocess.run([*command, str(len(there))], check=True)
    assert [record.group.id for record in groups.read(tmp_path / "inbox", 0)] == [0, 1, 2, 3]
    assert [group.id for _, group in samples.newest_first(tmp_path / "samples")] == [3, 2]
