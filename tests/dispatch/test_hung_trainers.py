"""Trainers that hang before their first step, and trainers that do not: they stood still with all the machine.

`row_N` as in docs/faults.md.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from http_calls import call
from jobs import check_and_stop, events, lease_ends, step_events, train
from live import LiveServer
from waiting import until

from arbor_core import ExecutorSettings
from arbor_core.builtin.executor import LocalExecutor
from arbor_core.dispatch.monitor import Monitor, MonitoredAttempt, Progress
from arbor_core.jobdir.heartbeat import Heartbeat, last_beat
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.process.lifecycle import process_ref
from arbor_core.testing import JobDirectory
from arbor_core.testing.invariants import processes
from arbor_core.types import Group, MessageEvent, Rollout
from arbor_core.worker.rollout_run import RolloutWorkerRun
from arbor_core.worker.run import open_run

HEARTBEAT = AttemptDir(Path()).heartbeat.name
LIMITS = SimpleNamespace(heartbeat_seconds=9.0, start_seconds=9.0)


def test_row_90_a_trainer_that_hangs_before_its_first_step_is_ended_and_tried_again(
    start_server: Callable[..., LiveServer],
) -> None:
    pytest.importorskip("arbor_grpo", reason="brings the route")
    server = start_server("limits.start_seconds=3", "limits.heartbeat_seconds=100", "limits.attempts=9")
    client = server.new_client(_strict_response_validation=False)
    config = {"num_generations": 2, "fault": "hang", "fault_step": 0}
    asked = {"model": "mock/tiny", "trainer_config": config}
    job = call(server.url, "POST", "/v1/fine_tuning/grpo/initialize", asked).json["job_id"]
    until(lambda: any("not begun to train after 3 seconds" in event.message for event in events(server, job)))
    until(lambda: list(server.storage.glob(f"jobs/{job}/attempts/*/{HEARTBEAT}")))
    client.fine_tuning.jobs.cancel(job)
    server.wait(job, "cancelled")
    check_and_stop(server)


def test_row_90_who_waits_for_rollouts_has_begun(tmp_path: Path, chat_rows: list[dict[str, Any]]) -> None:
    job = JobDirectory(tmp_path / "job", "mock_grpo", chat_rows, "mock/tiny")
    job.send(Group(id=1, rollouts=(Rollout(reward=1.0),), version=0))
    run = open_run(job.prepare(), RolloutWorkerRun)
    heartbeat = run.attempt_dir / HEARTBEAT
    run.message("loading")
    assert last_beat(heartbeat) is None
    assert len(run.groups(0, 0.0)) == 1
    assert last_beat(heartbeat) is not None


def test_row_112_looks_without_a_beat_are_counted_and_no_clock_is_read(tmp_path: Path) -> None:
    path = tmp_path / HEARTBEAT
    progress, heartbeat = Progress(), Heartbeat(path)
    heartbeat.beat_if_started()
    assert not path.exists(), "before the first step it does not beat"
    heartbeat.beat()
    os.utime(path, (1, 1))  # a clock that was an age behind
    progress.note(last_beat(path))
    assert (progress.beat is None, progress.missed) == (False, 0)
    for missed in (1, 2, 3):
        progress.note(last_beat(path))
        assert progress.missed == missed
    os.utime(path, (1 << 33, 1 << 33))
    progress.note(last_beat(path))
    assert progress.missed == 0


class Told:
    """An executor that says what it is told to say."""

    def __init__(self, beats: dict[str, str | None]) -> None:
        self.beats, self.asked = beats, list[Mapping[str, Path]]()

    async def poll(self, attempts: Mapping[str, Path]) -> Mapping[str, str | None]:
        self.asked.append(attempts)
        return {ref: beat for ref, beat in self.beats.items() if ref in attempts}


def monitor_of(executor: Any, limits: Any, *attempts: MonitoredAttempt) -> Monitor:
    unused: Any = None
    said: list[tuple[Any, ...]] = []

    async def add_event(event: MessageEvent, *job_ids: str) -> None:
        said.append((event.level, event.message, *job_ids))

    ingest: Any = SimpleNamespace(jobs=SimpleNamespace(add_event=add_event), said=said)
    monitor = Monitor(unused, ingest, unused, executor, limits)
    monitor.monitored = {attempt.job.id: attempt for attempt in attempts}
    return monitor


async def test_all_attempts_are_looked_at_in_one_batch_and_those_that_do_not_live_are_woken(tmp_path: Path) -> None:
    executor = Told({"1": "a beat", "2": None})
    jobs: Any = [SimpleNamespace(id=f"ftjob-{n}", ref=str(n) if n else None, offset=0) for n in range(4)]
    attempts = [MonitoredAttempt(job, AttemptDir(tmp_path / job.id)) for job in jobs]
    await monitor_of(executor, LIMITS, *attempts).go_round()
    assert executor.asked == [{str(n): tmp_path / f"ftjob-{n}" for n in (1, 2, 3)}]
    assert [attempt.missing for attempt in attempts] == [True, False, False, True]
    assert [attempt.wakeup.is_set() for attempt in attempts] == [True, False, False, True]


async def test_an_attempt_whose_files_cannot_be_seen_holds_up_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refs = {"file": process_ref(os.getpid()), "ftjob-x": process_ref(os.getppid())}
    jobs: Any = [SimpleNamespace(id=name, ref=ref, offset=0) for name, ref in refs.items()]
    broken, whole = (MonitoredAttempt(job, AttemptDir(tmp_path / job.id / "1")) for job in jobs)
    whole.files.path.mkdir(parents=True)
    whole.files.heartbeat.touch()
    executor = LocalExecutor(ExecutorSettings("cold", tmp_path / "run"))
    assert await executor.poll({broken.job.ref or "": broken.files.path}) == {broken.job.ref: None}
    monitor = monitor_of(executor, LIMITS, broken, whole)
    await monitor.go_round()
    assert (broken.wakeup.is_set(), broken.missing) == (True, False)
    assert (whole.wakeup.is_set(), whole.progress.beat is None) == (False, False)


async def test_an_executor_that_cannot_say_who_lives_ends_nobody_and_events_are_taken(tmp_path: Path) -> None:
    async def poll(attempts: object) -> None:
        raise ConnectionRefusedError("the cluster does not answer")

    job: Any = SimpleNamespace(id="ftjob-x", ref="1", offset=0)
    attempt = MonitoredAttempt(job, AttemptDir(tmp_path))
    monitor = monitor_of(SimpleNamespace(poll=poll), LIMITS, attempt)
    await monitor.go_round()
    assert not attempt.wakeup.is_set()
    attempt.files.events.write_text("news")
    await monitor.go_round()
    assert (attempt.missing, attempt.progress.missed, attempt.wakeup.is_set()) == (False, 0, True)


async def test_row_140_jobs_are_told_that_their_machine_does_not_answer_and_that_it_does_again(tmp_path: Path) -> None:
    beats: list[Any] = [{"1": "a"}, OSError("frozen"), TimeoutError(), {"1": "a"}, OSError("frozen"), OSError("frozen")]

    async def poll(attempts: object) -> Any:
        if isinstance(found := beats.pop(0), Exception):
            raise found
        return found

    limits: Any = SimpleNamespace(heartbeat_seconds=0, start_seconds=1e9)
    jobs: Any = [SimpleNamespace(id=name, ref=ref, offset=0) for name, ref in (("ftjob-x", "1"), ("starts", None))]
    attempts = [MonitoredAttempt(job, AttemptDir(tmp_path / job.id)) for job in jobs]
    monitor: Any = monitor_of(SimpleNamespace(poll=poll), limits, *attempts)
    while beats:
        assert not attempts[0].missing
        await monitor.go_round()
        assert attempts[0].progress.missed <= 1, "rounds without an answer are none without progress"
    said = [(level, "lives" in message, *ids) for level, message, *ids in monitor.ingest.said]
    assert said == [("warn", True, "ftjob-x"), ("info", True, "ftjob-x"), ("warn", True, "ftjob-x")]


@pytest.mark.parametrize(("allowed", "looks"), [(3.0, 4), (1.0, 2), (0.1, 2)])
@pytest.mark.parametrize("begun", [True, False])
async def test_row_90_a_trainer_is_ended_by_as_many_looks_as_seconds(
    tmp_path: Path, allowed: float, looks: int, begun: bool
) -> None:
    """However late each of them comes: the machine may have stood still before."""
    seconds = (allowed, 1e9) if begun else (1e9, allowed)
    limits: Any = SimpleNamespace(heartbeat_seconds=seconds[0], start_seconds=seconds[1])
    executor = Told({"1": "a beat" if begun else None})
    job = cast("Any", SimpleNamespace(id="ftjob-x", ref="1", offset=0))
    attempt = MonitoredAttempt(job, AttemptDir(tmp_path))
    monitor = monitor_of(executor, limits, attempt)
    (tmp_path / HEARTBEAT).touch()  # nobody but the executor looks at it
    if begun:
        await monitor.go_round()
    for _ in range(looks):
        assert not attempt.hung
        await monitor.go_round()
    assert attempt.wakeup.is_set()
    said = "made no progress for" if begun else "had not begun to train after"
    assert attempt.hung == f"it {said} {allowed:g} seconds and was ended"


def test_row_90_a_machine_that_stood_still_loses_no_trainer(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=8")
    job = train(server, chat_rows, steps=60, step_seconds=0.05)
    [heartbeat] = until(lambda: list(server.storage.glob(f"jobs/{job}/attempts/1/{HEARTBEAT}")))
    others = processes(server.storage).keys() - {server.process.pid}
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: time.time() - heartbeat.stat().st_mtime > 1.5)  # the server has seen the last beat
    server.process.send_signal(signal.SIGSTOP)
    until(lambda: time.time() - heartbeat.stat().st_mtime > 11)
    server.process.send_signal(signal.SIGCONT)
    for _ in range(3):
        assert not [event for event in events(server, job) if event.level != "info"]
    for pid in others:
        os.kill(pid, signal.SIGCONT)
    assert server.wait(job).status == "succeeded"
    assert step_events(server, job) == list(range(1, 61))
    assert not list(server.storage.glob(f"jobs/{job}/attempts/2"))
    check_and_stop(server)


def test_row_90_a_trainer_that_hangs_is_ended_and_tried_again(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=4")
    job = train(server, chat_rows, steps=6, step_seconds=0.05, checkpoint_steps=2, fault="hang", fault_step=4)
    found = server.wait(job)
    assert found.status == "succeeded", found.error
    said = [event.message for event in events(server, job)]
    assert any("made no progress for 4 seconds" in text and "checkpoint at step 4" in text for text in said), said
    assert lease_ends(server, job) == ["hung", "succeeded"]
    check_and_stop(server)


def test_row_90_a_trainer_that_keeps_hanging_fails(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=1", "limits.attempts=1")
    job = train(server, chat_rows, steps=6, step_seconds=0.05, checkpoint_steps=6, fault="hang", fault_step=2)
    found = server.wait(job, "failed")
    assert found.error.code == "worker_hung"
    assert lease_ends(server, job) == ["hung"]
    check_and_stop(server)
