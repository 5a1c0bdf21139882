"""Trainers that die again and again: what they get on by counts, and what they make again is shown once."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from http_calls import JOBS, call
from jobs import create, messages, supervisor_of
from live import ENDED, LiveServer
from waiting import until

from arbor_core import MetricsEvent, ResumePointWritten
from arbor_core.jobdir.layout import JobDir
from arbor_core.storage.event_log import tail
from arbor_core.testing.invariants import check_invariants, processes

Rows = list[dict[str, Any]]
SECONDS = 300


def reported(server: LiveServer, job_id: str, kind: type[Any], attempt: int | None = None) -> list[Any]:
    """Events of a kind as the attempts of a job have written them, or one of them."""
    attempts = JobDir.of(server.storage, job_id).attempts()
    logs = [each.events for each in attempts if attempt in (None, each.number)]
    return [event for log in logs if log.exists() for _, event in tail(log) if isinstance(event, kind)]


def shown(server: LiveServer, job_id: str, query: str = "") -> list[dict[str, Any]]:
    """The metrics in a job's list of events, oldest first."""
    found = call(server.url, "GET", f"{JOBS}/{job_id}/events?limit=1000{query}").json["data"]
    return [event for event in found[::-1] if event["type"] == "metrics"]


def check_shown(server: LiveServer, job: Any) -> dict[int, Any]:
    """Each step is in the list of events and in the result file once, and all that was made with `superseded=true`, of
    which what was made again is marked. Returns the data of the steps."""
    made = [event.step for event in reported(server, job.id, MetricsEvent)]
    steps = shown(server, job.id)
    assert [event["data"]["step"] for event in steps] == sorted(set(made))
    every = shown(server, job.id, "&superseded=true")
    assert [event["data"]["step"] for event in every] == made
    marked = Counter(event["data"]["step"] for event in every if event.get("superseded"))
    assert marked == {step: times - 1 for step, times in Counter(made).items() if times > 1}
    assert [event["id"] for event in every if not event.get("superseded")] == [event["id"] for event in steps]
    table = server.client.files.content(job.result_files[0]).text.splitlines()
    assert [int(row["step"]) for row in csv.DictReader(table)] == sorted(set(made))
    return {event["data"]["step"]: event["data"] for event in steps}


def died(server: LiveServer, job_id: str) -> int:
    return sum("The training process died" in text for text in messages(server, job_id))


def worker_of(server: LiveServer, job_id: str) -> int:
    """Process id of a job's trainer; 0: it has none now."""
    supervisor = supervisor_of(server, job_id)
    inside = processes(server.storage / "jobs" / job_id).keys() - {supervisor}
    return next(iter(inside), 0) if supervisor else 0


def test_a_trainer_that_dies_often_and_gets_on_is_not_given_up(
    start_server: Callable[..., LiveServer], chat_rows: Rows
) -> None:
    """Each attempt dies when it has told of its third step, and has left two resume points."""
    server = start_server("limits.attempts=2", env={"ARBOR_CRASH_BELOW": "metrics.event:3"})
    keys = {"steps": 10, "checkpoint_steps": 10, "resume_seconds": 0}
    job = server.wait(create(server, chat_rows, hyperparameters=keys).id)
    assert (job.status, died(server, job.id)) == ("succeeded", 4)
    made = [event.step for event in reported(server, job.id, MetricsEvent)]
    assert made == [1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 10]
    check_shown(server, job)
    check_invariants(server.storage, ended=False)


def test_a_trainer_that_does_not_get_on_any_more_is_given_up(
    start_server: Callable[..., LiveServer], chat_rows: Rows
) -> None:
    """It had got on before. After its second resume point it is killed as soon as it is there."""
    server = start_server("limits.attempts=3")
    keys = {"steps": 1000, "step_seconds": 2, "resume_seconds": 0}
    job = create(server, chat_rows, hyperparameters=keys).id
    until(lambda: len(reported(server, job, ResumePointWritten)) >= 2, SECONDS)
    while server.client.fine_tuning.jobs.retrieve(job).status not in ENDED:
        if pid := worker_of(server, job):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    failed = server.wait(job, "failed")
    assert failed.error.code == "worker_crashed"
    assert "died 3 times without progress" in failed.error.message
    assert not (server.storage / "jobs" / job / "resume").exists()


@pytest.mark.ml
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_places_it_ends_as_without(start_server: Callable[..., LiveServer], tmp_path: Path) -> None:
    """Real training on a model of its own: more deaths than a job has attempts, wherever they fall."""
    tiny = tmp_path / "models" / "tiny"
    subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(tiny)], check=True, capture_output=True)
    server = start_server("+trainer=sft", f"models.dirs=[{tmp_path / 'models'}]", "threads=1", mock=False)
    said = [("q" * (n % 9 + 1), "a" * (n % 5 + 1)) for n in range(48)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in said]
    keys = {"n_epochs": 8, "batch_size": 4, "checkpoint_steps": 50, "lora": {"r": 4, "dropout": 0.1}}
    ask = {"model": "tiny", "training_file": server.upload(rows), "seed": 3}

    def started(**more: Any) -> str:
        method = {"type": "supervised", "supervised": {"hyperparameters": {**keys, **more}}}
        return str(server.client.fine_tuning.jobs.create(**ask, method=method).id)

    whole = server.wait(started(resume_seconds=None), seconds=SECONDS)
    killed, draw = started(resume_seconds=0.05), random.Random()
    for attempt in range(1, 7):
        before = max((event.step for event in reported(server, killed, ResumePointWritten)), default=0)
        steps = draw.randint(0, 6)

        def got_on(attempt: int = attempt, before: int = before, steps: int = steps) -> bool:
            points = [event.step for event in reported(server, killed, ResumePointWritten, attempt)]
            made = [event.step for event in reported(server, killed, MetricsEvent, attempt)]
            later = [step for step in points if step > before]
            return bool(later) and max(made) >= later[0] + steps

        until(got_on, SECONDS)
        os.kill(worker_of(server, killed), signal.SIGKILL)
    job = server.wait(killed, seconds=SECONDS)
    assert (job.status, died(server, killed)) == ("succeeded", 6), job.error
    data, undisturbed = check_shown(server, job), check_shown(server, whole)
    assert {step: values["digest"] for step, values in data.items()} == {
        step: values["digest"] for step, values in undisturbed.items()
    }
    assert job.trained_tokens == whole.trained_tokens
    check_invariants(server.storage, ended=False)
