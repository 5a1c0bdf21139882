"""The crash matrix: every fault point is reached once by a real server or one of its processes, which dies there.

Whoever dies, the next server brings every job to its end, and the invariants hold. The points that cover each kind of
process run always; all of them with `make crash`.
"""

from __future__ import annotations

import hashlib
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from crash import (
    REMOTE,
    REMOTE_MACHINE,
    REMOTE_SERVER,
    REMOTE_SERVER_ALWAYS,
    SERVER,
    SERVER_ALWAYS,
    WORKERS,
    WORKERS_ALWAYS,
    check_the_rest,
    marked,
)
from jobs import go_on, hanging, stopped
from live import ENDED, LiveServer

from arbor_core.testing.invariants import Seen

STEPS = 30


@dataclass
class Client:
    """Does what clients do, and remembers what it was promised. A server that dies under it is no surprise."""

    server: LiveServer
    files: dict[str, str] = field(default_factory=dict)
    jobs: set[str] = field(default_factory=set)

    def play(self, rows: list[dict[str, Any]]) -> None:
        """One job that is paused, resumed and succeeds, and one that is cancelled while it runs. Each stands still for
        that, so that it has not succeeded before."""
        client = self.server.new_client(_strict_response_validation=False)
        job = self.create(rows)
        self.until(job, lambda found: stopped(self.server, job))
        client.fine_tuning.jobs.pause(job)
        desired = self.server.storage / "jobs" / job / "desired"
        self.until(job, lambda found: desired.read_text() == "pause")
        go_on(self.server, job)
        self.until(job, lambda found: found.status == "paused")
        client.fine_tuning.jobs.resume(job)
        other = self.create(rows)
        self.until(other, lambda found: found.status == "running")
        client.fine_tuning.jobs.cancel(other)
        for each in (job, other):
            self.until(each, lambda found: found.status in ENDED)

    def create(self, rows: list[dict[str, Any]]) -> str:
        file_id = self.server.upload(rows)
        content = self.server.client.files.content(file_id).read()
        self.files[file_id] = hashlib.sha256(content).hexdigest()
        hyper = hanging(3, steps=STEPS, step_seconds=0.05, checkpoint_steps=2)
        job = self.server.client.fine_tuning.jobs.create(
            model="mock/tiny",
            training_file=file_id,
            method={"type": "supervised", "supervised": {"hyperparameters": hyper}},  # type: ignore[typeddict-item]
        )
        self.jobs.add(job.id)
        return job.id

    def until(self, job: str, condition: Callable[[Any], bool]) -> None:
        """Wait for a condition; a job that has ended meanwhile meets every one."""
        client = self.server.new_client(_strict_response_validation=False)
        deadline = time.monotonic() + 120
        while not condition(found := client.fine_tuning.jobs.retrieve(job)) and found.status not in ENDED:
            assert time.monotonic() < deadline, f"{job} is still {found.status}\n{self.server.log}"
            time.sleep(0.02)


def bring_to_an_end(server: LiveServer, files: dict[str, str], jobs: set[str]) -> None:
    """Resume what is paused, let go on what stands still, wait for all; what was promised is there."""
    client = server.new_client(_strict_response_validation=False)
    listed = {job.id for job in client.fine_tuning.jobs.list(limit=50)}
    assert jobs <= listed
    deadline = time.monotonic() + 120
    while waiting := [job for job in client.fine_tuning.jobs.list(limit=50) if job.status not in ENDED]:
        for job in waiting:
            if job.status == "paused":
                client.fine_tuning.jobs.resume(job.id)
            go_on(server, job.id)
        assert time.monotonic() < deadline, f"{waiting}\n{server.log}"
        time.sleep(0.03)
    for job in client.fine_tuning.jobs.list(limit=50):
        assert job.status in ("succeeded", "cancelled"), job.error
    for file_id, digest in files.items():
        assert hashlib.sha256(client.files.content(file_id).read()).hexdigest() == digest


@pytest.mark.parametrize("point", marked(SERVER_ALWAYS, SERVER))
def test_a_server_that_dies_at(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server_dies(point, start_server, chat_rows)


@pytest.mark.parametrize("point", marked(REMOTE_SERVER_ALWAYS, REMOTE_SERVER))
def test_a_server_of_another_machine_that_dies_at(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server_dies(point, start_server, chat_rows, *REMOTE)


def server_dies(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], *options: str
) -> None:
    """A server that dies at a point, and the next one."""
    server = start_server("gpu.train=[0,1]", *options, env={"ARBOR_CRASH_AT": point})
    client = Client(server)
    with suppress(openai.APIConnectionError):
        client.play(chat_rows)
    assert server.process.wait(120) == -signal.SIGKILL, f"the server never came to {point}"
    seen = Seen(server.storage)
    again = start_server("gpu.train=[0,1]", *options)
    bring_to_an_end(again, client.files, client.jobs)
    check_the_rest(again, seen)


@pytest.mark.parametrize("point", marked(WORKERS_ALWAYS, WORKERS))
def test_a_process_of_a_job_that_dies_at(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    process_dies(point, start_server, chat_rows, tmp_path / "died")


@pytest.mark.parametrize("point", marked([], REMOTE_MACHINE))
def test_another_machine_that_dies_at(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    process_dies(point, start_server, chat_rows, tmp_path / "died", *REMOTE)


def process_dies(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], once: Path, *options: str
) -> None:
    """The first process below the server that comes to a point dies there."""
    where = {"ARBOR_CRASH_BELOW": point, "ARBOR_CRASH_ONCE": str(once)}
    server = start_server("gpu.train=[0,1]", *options, env=where)
    seen = Seen(server.storage)
    client = Client(server)
    client.play(chat_rows)
    assert once.exists(), f"no process came to {point}"
    bring_to_an_end(server, client.files, client.jobs)
    check_the_rest(server, seen)


@pytest.mark.crash
@pytest.mark.parametrize("point", ["file.written", "file.renamed", "job.created", "job.document"])
def test_a_job_that_is_cancelled_although_its_server_died_at(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    """It ends without an attempt, and what the writer of its document left goes with that."""
    server = start_server("gpu.train=[0,1]", env={"ARBOR_CRASH_AT": point})
    with suppress(openai.APIConnectionError):
        Client(server).create(chat_rows)
    assert server.process.wait(120) == -signal.SIGKILL, f"the server never came to {point}"
    with closing(sqlite3.connect(server.storage / "arbor.db")) as db, db:
        [(job,)] = db.execute("UPDATE jobs SET desired='cancel' RETURNING id").fetchall()
    seen = Seen(server.storage)
    again = start_server("gpu.train=[0,1]")
    assert again.wait(job).status == "cancelled"
    check_the_rest(again, seen)
