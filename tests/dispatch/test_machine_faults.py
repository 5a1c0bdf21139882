"""A machine that dies, runs out of memory or of descriptors, and requests that race with a job's end. `row_N` as in
docs/faults.md."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from chaos_checks import supervisors
from http_calls import FILE, JOBS, MULTIPART, PATIENCE, PURPOSE, Answer, call, form, settled, submit, supervised
from jobs import events, hanging, lease_ends, step_events, stopped
from live import LiveServer
from waiting import until

from arbor_core.dispatch.outcome import last_word
from arbor_core.models import memory
from arbor_core.testing import JobDirectory
from arbor_core.testing.invariants import check_invariants

ENDS = {"succeeded": "The job has successfully completed", "cancelled": "Fine-tuning job {} cancelled"}


def test_row_92_server_and_trainer_die_together(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server()
    file = server.upload(chat_rows)
    plan = supervised(**hanging(7, steps=40, checkpoint_steps=5))
    job = submit(server, file, method=plan, metadata={"kept": "yes"}).json["id"]
    until(lambda: stopped(server, job) and list(server.client.fine_tuning.jobs.checkpoints.list(job)))
    seen = step_events(server, job)
    server.process.kill()
    for supervisor in supervisors(server.storage):
        os.kill(supervisor, signal.SIGKILL)
    server.stop()
    again = start_server()
    found = again.wait(job)
    assert (found.status, found.metadata) == ("succeeded", {"kept": "yes"})
    assert step_events(again, job)[: len(seen)] == seen
    assert max(step_events(again, job)) == 40
    assert any("attempt 2 starts from the checkpoint at step" in event.message for event in events(again, job))
    assert again.stop() == 0
    check_invariants(again.storage)


@pytest.mark.parametrize("seen", [4, 3, 2, 1])
def test_row_100_cancelling_at_the_end(server: LiveServer, chat_rows: list[dict[str, Any]], seen: int) -> None:
    """Asked by several clients at once, around the last step: whoever wins, everybody sees one and the same end."""
    job = submit(server, server.upload(chat_rows), method=supervised(steps=4, step_seconds=0.02)).json["id"]
    until(lambda: len(step_events(server, job)) >= seen)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: call(server.url, "POST", f"{JOBS}/{job}/cancel"), range(3)))
    end = server.wait(job, "succeeded", "cancelled").status
    texts = [event.message for event in events(server, job)]
    assert [texts.count(text.format(job)) for text in ENDS.values()] == [int(name == end) for name in ENDS]
    for answer in answers:
        if answer.status == 200:
            assert answer.json["status"] in ("validating_files", "queued", "running", end)
        else:
            answer.error(400, "invalid_job_state")
            assert end == "succeeded"


@pytest.mark.parametrize(
    ("raised", "rank"),
    [
        ("OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')", 0),
        ("RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory: Tried to allocate 20.00 MiB')", 0),
        ("MemoryError('Unable: Tried to allocate 20.00 MiB')", 0),
        ("OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')", 1),
    ],
)
def test_row_88_memory_that_does_not_do_is_named(
    tmp_path: Path, chat_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, raised: str, rank: int
) -> None:
    """What allocators raise, by name or words: the core knows no torch. Another rank than the first leaves word."""
    (tmp_path / "hungry.py").write_text(
        f"class OutOfMemoryError(RuntimeError):\n    pass\n\n\ndef train(run):\n    raise {raised}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("RANK", str(rank))
    job = JobDirectory(tmp_path / "job", "mock", chat_rows, "mock/tiny")
    job.entry = "hungry:train"
    assert job.attempt() == 1
    outcome = last_word(job.files.attempt(job.attempts))
    assert outcome is not None
    assert outcome.type == "error"
    assert outcome.code == "out_of_memory"
    assert "Tried to allocate 20.00 MiB" in outcome.message


def test_row_88_it_is_tried_once_more_with_smaller_micro_batches(
    server: LiveServer, chat_rows: list[dict[str, Any]]
) -> None:
    fault = {"steps": 5, "checkpoint_steps": 1, "fault": "out_of_memory", "fault_step": 3}
    job = submit(server, server.upload(chat_rows), method=supervised(**fault)).json["id"]
    assert server.wait(job).status == "succeeded"
    [warning] = [event.message for event in events(server, job) if event.level == "warn"]
    assert "Tried to allocate" in warning
    assert "attempt 2 starts from the checkpoint at step 3, with micro-batches half the size" in warning
    assert step_events(server, job) == [1, 2, 3, 4, 5]
    shares = [placement(server, job, attempt)["micro_batch_share"] for attempt in (1, 2)]
    assert shares == [1.0, 0.5]
    assert lease_ends(server, job) == ["out_of_memory", "succeeded"]


def test_row_88_and_fails_then(server: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    fault = {"steps": 5, "checkpoint_steps": 5, "fault": "out_of_memory", "fault_step": 3, "fault_times": 9}
    job = submit(server, server.upload(chat_rows), method=supervised(**fault)).json["id"]
    error = server.wait(job, "failed").error
    assert error.code == "out_of_memory"
    assert "Tried to allocate" in error.message
    assert "take a smaller base model" in error.message
    assert [event.level for event in events(server, job) if event.level != "info"] == ["warn", "error"]


def placement(server: LiveServer, job: str, attempt: int) -> dict[str, Any]:
    path = server.storage / "jobs" / job / "attempts" / str(attempt) / "placement.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"micro_batch_size": "auto", "max_length": None, "gradient_checkpointing": False, "lora": None}, "(lora)"),
        ({"micro_batch_size": 4, "gradient_checkpointing": False}, "turn gradient_checkpointing on"),
        ({"micro_batch_size": 4, "gradient_checkpointing": True}, "lower micro_batch_size, or take"),
    ],
)
def test_row_88_what_to_lower(config: dict[str, Any], said: str) -> None:
    assert said in memory.advice(config, trains_all="lora" in config)


@contextlib.contextmanager
def no_descriptors(server: LiveServer) -> Iterator[http.client.HTTPConnection]:
    """A connection to a server that can open nothing more: what it has open stays, and every number below the limit is
    taken as long as it lives."""
    pid, (_, host) = server.process.pid, server.url.split("//")
    connection = http.client.HTTPConnection(host, timeout=PATIENCE)
    connection.request("GET", "/health")
    connection.getresponse().read()
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    standard = [number for number in range(3) if Path(f"/proc/{pid}/fd/{number}").exists()]
    assert standard == [0, 1, 2]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(standard), limits[1]))
    try:
        yield connection
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        connection.close()


def test_row_115_without_descriptors_jobs_go_on(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server()
    job = submit(server, server.upload(chat_rows), method=supervised(steps=60, step_seconds=0.05)).json["id"]
    until(lambda: step_events(server, job))
    before = settled(server)
    with no_descriptors(server) as connection:
        connection.request("POST", "/v1/files", form(PURPOSE, FILE), MULTIPART)
        answer = connection.getresponse()
        refused = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    refused.error(503, "server_overloaded")
    assert int(refused.headers["retry-after"]) > 0
    assert settled(server) == before
    assert server.wait(job).status == "succeeded"
    assert step_events(server, job) == list(range(1, 61))
    assert server.upload(b"{}\n")


def test_row_101_what_has_ended_is_neither_paused_nor_resumed(
    server: LiveServer, chat_rows: list[dict[str, Any]]
) -> None:
    job = submit(server, server.upload(chat_rows), method=supervised(steps=1)).json["id"]
    server.wait(job)
    seen = events(server, job)
    for verb in ("pause", "resume"):
        call(server.url, "POST", f"{JOBS}/{job}/{verb}").error(400, "invalid_job_state")
    assert events(server, job) == seen


def test_the_database_is_sound_after_all_that(server: LiveServer) -> None:
    with contextlib.closing(sqlite3.connect(server.storage / "arbor.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
