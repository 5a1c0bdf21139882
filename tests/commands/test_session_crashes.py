"""The crash matrix of commands: a server, or the process that executes them, dies between any two side effects.

A client sends commands out of order and repeats what it got no answer to, follows the results and acknowledges them.
Whoever dies: each command is executed once as far as anybody can tell, and what was told stands.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import pytest
from crash import (
    COMMAND_DIRECT,
    COMMAND_DIRECT_ALWAYS,
    COMMAND_SERVER,
    COMMAND_SERVER_ALWAYS,
    COMMAND_WORKERS,
    COMMAND_WORKERS_ALWAYS,
    SMALL_SEGMENTS,
    CrashClient,
    marked,
)
from http_calls import JOBS, call
from live import ENDED, LiveServer
from waiting import until

from arbor_core.storage.synced_log import segments
from arbor_core.testing.invariants import Seen, processes

tensor_file = pytest.importorskip("arbor_mock.train").tensor_file
CHAT = "/v1/chat/completions"

ROUNDS = 4
ADDED = [{"do": "add", "n": 3}, {"do": "checkpoint"}, {"do": "add", "n": -1}, {"do": "publish"}]
"""What each round sends; its last command asks for the sum."""


@dataclass
class Client(CrashClient):
    """Has one job execute commands."""

    job_id: str = ""
    number: int = 0
    told: dict[int, dict[str, Any]] = field(default_factory=dict)

    def good(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.ask(method, f"/v1/mock/jobs/{self.job_id}/{path}", body)
        assert answer.status == 200, answer.body
        return dict(answer.json)

    def begin(self, **hyperparameters: Any) -> None:
        method = {"type": "mock_commands", "mock_commands": {"hyperparameters": hyperparameters}}
        answer = self.ask("POST", JOBS, {"model": "mock/tiny", "method": method})
        assert answer.status == 200, answer.body
        self.job_id = answer.json["id"]

    def send(self) -> None:
        """A round of commands, the last one first."""
        sent = [{"number": self.number + n, **command} for n, command in enumerate([*ADDED, {"do": "sum"}], 1)]
        for command in reversed(sent):
            assert self.good("POST", "commands", command)["number"] == command["number"]
        assert self.good("POST", "commands", sent[0])["repeated"]
        self.number += len(sent)

    def follow(self) -> None:
        """Wait until everything is answered. What was told before is told again as it was."""
        deadline, first = time.monotonic() + 120, max(self.told, default=0)
        after = first
        while after < self.number:
            assert time.monotonic() < deadline, self.server.log
            for result in self.good("GET", f"results?after={after}&seconds=5")["data"]:
                after += 1
                assert result["number"] == after
                self.told[after] = result
        assert [result["number"] for result in self.good("GET", f"results?after={first}")["data"]][:1] == [first + 1]

    def acknowledge(self, up_to: int) -> None:
        assert self.good("POST", "acknowledge", {"up_to": up_to})["acknowledged"] >= up_to

    def play(self) -> None:
        """From the first command to the end of the job."""
        self.begin()
        for _ in range(ROUNDS):
            self.send()
            self.follow()
            self.acknowledge(self.number - 2)
        for result in self.good("GET", f"results?after={self.number - 2}")["data"]:
            assert result == self.told[result["number"]]
        self.finish()

    def finish(self) -> None:
        self.ask("POST", f"/v1/mock/jobs/{self.job_id}/finish")
        deadline = time.monotonic() + 120
        while (job := self.ask("GET", f"{JOBS}/{self.job_id}").json)["status"] not in ENDED:
            assert time.monotonic() < deadline, (job, self.server.log)
            self.ask("POST", f"/v1/mock/jobs/{self.job_id}/finish")
        assert job["status"] == "succeeded", job

    def weights(self) -> str:
        """The SHA-256 of the weights that the job's model answers with."""
        asked = [{"role": "user", "content": "[mock: weights=1]"}]
        answer = self.ask("POST", CHAT, {"model": self.job_id, "messages": asked}, again=(503,))
        assert answer.status == 200, answer.body
        return str(answer.json["choices"][0]["message"]["content"])

    def check(self) -> None:
        """Every command had its one effect."""
        per_round = len(ADDED) + 1
        for number, result in self.told.items():
            rounds, place = divmod(number - 1, per_round)
            before = 2 * rounds
            wanted = [{"sum": before + 3}, {"step": number - 1}, {"sum": before + 2}, {"version": number}][place:] or [
                {"sum": before + 2}
            ]
            assert result == {"number": number, **wanted[0]}
        kept = segments(self.server.storage / "jobs" / self.job_id / "results")
        assert len(kept) <= 2, f"results that were acknowledged are kept: {kept}"


def weights_after(rounds: int) -> str:
    """The SHA-256 of the policy that the last of so many rounds has published."""
    digest = ""
    for number in (3, -1) * rounds:
        digest = blake2b(f"{digest} {number}".encode(), digest_size=16).hexdigest()
    return sha256(tensor_file(random.Random(digest))).hexdigest()


@pytest.mark.parametrize("point", marked(COMMAND_SERVER_ALWAYS, COMMAND_SERVER))
def test_a_server_that_dies_at(point: str, start_server: Callable[..., LiveServer]) -> None:
    first = start_server(env={"ARBOR_CRASH_AT": point, **SMALL_SEGMENTS})
    seen = Seen(first.storage)
    client = Client(first, lambda: start_server(env=SMALL_SEGMENTS))
    client.play()
    assert client.server is not first, f"the server never came to {point}"
    client.finished(seen)


@pytest.mark.parametrize("point", marked(COMMAND_WORKERS_ALWAYS, COMMAND_WORKERS))
def test_a_trainer_that_dies_at(point: str, start_server: Callable[..., LiveServer], tmp_path: Path) -> None:
    once = tmp_path / "died"
    server = start_server(env={"ARBOR_CRASH_BELOW": point, "ARBOR_CRASH_ONCE": str(once), **SMALL_SEGMENTS})
    seen = Seen(server.storage)
    client = Client(server, lambda: start_server(env=SMALL_SEGMENTS))
    client.play()
    assert once.exists(), f"no process came to {point}"
    client.finished(seen)


def test_both_killed_while_commands_wait(start_server: Callable[..., LiveServer]) -> None:
    server = start_server()
    seen = Seen(server.storage)
    client = Client(server, start_server)
    client.begin(step_seconds=0.05)
    client.send()
    client.follow()
    client.send()
    before = dict(client.told)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    seen.look()
    for pid in processes(server.storage / "jobs" / client.job_id):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    client.follow()
    client.acknowledge(client.number)
    assert before.items() <= client.told.items()
    refused = client.ask("GET", f"/v1/mock/jobs/{client.job_id}/results?after=0")
    refused.error(400, "result_acknowledged", "number")
    client.finish()
    client.finished(seen)


DIRECT = ("inference=mock_direct", "gpu.inference=[4,5]")
"""Policies come from the trainer's memory."""


@pytest.mark.parametrize("point", marked(COMMAND_DIRECT_ALWAYS, COMMAND_DIRECT))
def test_a_trainer_that_sends_or_an_engine_that_fetches_dies_at(
    point: str, start_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    """What answers after each round is what that round has published."""
    once = tmp_path / "died"
    server = start_server(*DIRECT, env={"ARBOR_CRASH_BELOW": point, "ARBOR_CRASH_ONCE": str(once)})
    seen = Seen(server.storage)
    client = Client(server, lambda: start_server(*DIRECT))
    client.begin()
    for rounds in range(1, ROUNDS + 1):
        client.send()
        client.follow()
        until(lambda rounds=rounds: client.weights() == weights_after(rounds))
    client.finish()
    assert once.exists(), f"no process came to {point}"
    assert not list(server.storage.glob("jobs/*/weights/*")), "policies are no files here"
    client.finished(seen)


@pytest.mark.parametrize("chosen", [(), DIRECT], ids=["files", "sender"])
def test_a_policy_is_served_however_often_its_job_is_paused(
    chosen: tuple[str, ...], start_server: Callable[..., LiveServer]
) -> None:
    client = Client(start_server(*chosen), start_server)
    client.begin()
    client.send()
    client.follow()
    for _ in range(5):  # weights of four attempts are kept
        for ask, status in (("pause", "paused"), ("resume", "running")):
            assert client.ask("POST", f"{JOBS}/{client.job_id}/{ask}").status == 200
            until(lambda status=status: client.ask("GET", f"{JOBS}/{client.job_id}").json["status"] == status)
    assert client.weights() == weights_after(1)
    client.ask("POST", f"{JOBS}/{client.job_id}/pause")
    until(lambda: client.ask("GET", f"{JOBS}/{client.job_id}").json["status"] == "paused")
    assert client.weights() == weights_after(1)
    client.ask("POST", f"{JOBS}/{client.job_id}/resume")
    client.finish()


def test_the_way_over_http(start_server: Callable[..., LiveServer]) -> None:
    """What clients get that ask for the wrong thing; and the policy that a command published answers."""
    server = start_server()
    client = Client(server, start_server)
    client.begin()
    client.send()
    path = f"/v1/mock/jobs/{client.job_id}"
    other = {"number": 1, "do": "add", "n": 99}
    call(server.url, "POST", f"{path}/commands", other).error(400, "command_number_reuse", "number")
    early = call(server.url, "POST", f"{path}/commands", {"number": 9999, "do": "sum"})
    early.error(429, "too_many_commands", "number")
    assert early.headers["retry-after"] == "1"
    client.follow()
    call(server.url, "POST", f"{path}/acknowledge", {"up_to": 99}).error(400, "result_missing", "up_to")
    call(server.url, "GET", "/v1/mock/jobs/ftjob-nope/results").error(404, "fine_tune_not_found", "fine_tune_id")
    answer = client.server.client.chat.completions.create(
        model=client.job_id, messages=[{"role": "user", "content": "good morning"}]
    )
    assert answer.choices[0].message.content
    began = time.monotonic()
    assert client.good("GET", f"results?after={client.number}&seconds=0.2")["data"] == []
    assert time.monotonic() - began >= 0.2
    client.finish()
    call(server.url, "POST", f"{path}/commands", {"number": 6, "do": "sum"}).error(400, "invalid_job_state", "job_id")
    assert [result["number"] for result in client.good("GET", "results?after=0")["data"]] == [1, 2, 3, 4, 5]
    client.check()


def test_a_job_on_a_file_takes_no_commands(server: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    job = server.client.fine_tuning.jobs.create(model="mock/tiny", training_file=server.upload(chat_rows))
    answer = call(server.url, "POST", f"/v1/mock/jobs/{job.id}/commands", {"number": 1, "do": "sum"})
    answer.error(400, "invalid_job_state", "job_id")
    body = {"model": "mock/tiny", "method": {"type": "mock_commands"}, "training_file": job.training_file}
    call(server.url, "POST", JOBS, body).error(400, "invalid_value", "training_file")
    until(lambda: server.client.fine_tuning.jobs.retrieve(job.id).status in ENDED)
