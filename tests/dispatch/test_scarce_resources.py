"""A machine that is short of descriptors, processes or memory for a while: jobs that cannot start wait for them.

`row_N` as in docs/faults.md.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arbor_core import AttemptOrder, ExecutorSettings, Lease, Placement, PoolAllocator
from arbor_core.builtin import executor
from arbor_core.builtin.executor import ForkServerKey, LocalExecutor
from arbor_core.dispatch import dispatcher
from arbor_core.dispatch.attempts import Attempts
from arbor_core.dispatch.dispatcher import Dispatcher
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.monitor import Monitor
from arbor_core.dispatch.observers import Observers
from arbor_core.dispatch.outcome import Outcomes
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.jobs.queue import training_claim
from arbor_core.jobs.records import Job, JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.plugins import Plugins
from arbor_core.process.lifecycle import process_ref
from arbor_core.storage.database import Store

SCARCE = [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM]


@dataclass
class Desk:
    """A dispatcher with one job that is about to start; its starts end as `faults` say, and then well."""

    dispatcher: Dispatcher
    job: Job
    lease: Lease
    faults: Iterator[Exception] = field(default_factory=lambda: iter(()))
    starts: int = 0
    monitored: list[str] = field(default_factory=list)
    monitor: Any = None
    """What monitors an attempt where a test does not only note it."""

    async def start(self, *_: Any) -> str:
        self.starts += 1
        if fault := next(self.faults, None):
            raise fault
        return "a ref"

    async def launch(self) -> Job:
        trainer: Any = None
        await self.dispatcher._launch(self.job, trainer, self.lease)
        return self.dispatcher.jobs.get(self.job.id) or self.job


@pytest.fixture
async def desk(tmp_path: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    nobody: Any = None
    models: Any = SimpleNamespace(root=tmp_path)
    local = LocalExecutor(ExecutorSettings("cold", tmp_path / "run"))
    attempts = Attempts(jobs, nobody, models, local, nobody, "storage_x", nobody, 1)
    ingest = Ingest(jobs, Observers(plugins), tmp_path, "arbor")
    outcomes = Outcomes(jobs, nobody, ingest, local, tmp_path, nobody)
    monitor = Monitor(attempts, ingest, outcomes, local, nobody)
    made = Dispatcher(
        jobs, attempts, nobody, monitor, {}, nobody, PoolAllocator({}), tmp_path / "bell", room_seconds=60
    )
    job = await jobs.create(
        NewJob("me", "file-x", None, None, {}, JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1))
    )
    await jobs.transition(job, "queued")
    running = await jobs.transition(jobs.get(job.id) or job, "running", attempt=1)
    assert running is not None
    found = Desk(made, running, Lease("lease-1", training_claim(job.id, 1), ((),)), monitor=monitor.monitor)

    async def watch(job: Job) -> None:
        found.monitored.append(job.ref or "")

    monkeypatch.setattr(dispatcher, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(attempts, "start", found.start)
    monkeypatch.setattr(monitor, "monitor", watch)
    yield found
    store.close()


@pytest.mark.parametrize("number", SCARCE)
async def test_row_115_a_start_waits_for_what_the_machine_is_short_of(desk: Desk, number: int) -> None:
    desk.faults = repeat(OSError(number, os.strerror(number)), 2)
    job = await desk.launch()
    assert (desk.starts, desk.monitored) == (3, ["a ref"])
    assert (job.status, job.error) == ("running", None)


@pytest.mark.parametrize(
    ("number", "said"),
    list(zip(SCARCE, ["ulimit -n", "fs.file-max", "ulimit -u", "memory"], strict=True)),
)
async def test_row_115_and_is_paused_when_that_lasts(desk: Desk, number: int, said: str) -> None:
    desk.faults = repeat(OSError(number, os.strerror(number)))
    desk.dispatcher.room_seconds = 0.3
    job = await desk.launch()
    assert desk.starts > 1
    assert desk.monitored == []
    assert (job.status, job.desired, job.error) == ("paused", "pause", None)
    last = desk.dispatcher.jobs.events(job.id, 1)[0]
    assert last.level == "error"
    assert (last.data or {})["code"] == "insufficient_resources"
    assert said in last.message
    assert "Resume it" in last.message


async def test_a_start_that_cannot_succeed_fails_at_once(desk: Desk) -> None:
    desk.faults = repeat(PermissionError(errno.EACCES, "Permission denied"))
    job = await desk.launch()
    assert desk.starts == 1
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "worker_not_started"


async def test_a_job_is_cancelled_while_an_executor_takes_its_time_to_start_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it has begun, and nothing will: a start that was on its way finds the claim taken."""
    given_up: list[bool] = []

    async def slow(*_: Any) -> str:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            given_up.append(True)

    monkeypatch.setattr(desk.dispatcher.attempts, "start", slow)
    monkeypatch.setattr(desk.dispatcher.monitor, "monitor", desk.monitor)
    launched = asyncio.create_task(desk.launch())
    await asyncio.sleep(0)
    await desk.dispatcher.jobs.set_desired(desk.job.id, "cancel")
    job = await asyncio.wait_for(launched, 120)
    assert job.status == "cancelled"
    assert given_up == [True]
    assert desk.dispatcher.attempts.attempt_dir(desk.job).claim("late") == ""


@pytest.mark.parametrize("call", ["adopt", "end"])
async def test_an_executor_that_fails_says_nothing_of_its_jobs(
    desk: Desk, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mistake is no damage to what the attempt has written, and no reason to give its devices to others."""

    async def mistaken(*_: Any) -> None:
        raise KeyError("a plugin's mistake")

    executor = desk.dispatcher.attempts.executor
    desk.dispatcher.attempts.attempt_dir(desk.job).claim("1:1:another-boot")
    with monkeypatch.context() as patch:
        patch.setattr(executor, call, mistaken)
        patch.setattr(desk.dispatcher.monitor, "monitor", desk.monitor)
        with pytest.raises(OSError, match='the executor failed: KeyError: "a plugin\'s mistake"'):
            await desk.monitor(desk.job)
        found = desk.dispatcher.jobs.get(desk.job.id)
        assert found is not None
        assert found.status == "running"
        desk.faults = repeat(RuntimeError("no"))
        with pytest.raises(OSError, match="the executor failed"):
            await desk.launch()
    limits = SimpleNamespace(attempts=3)
    monkeypatch.setattr(desk.dispatcher.monitor.outcomes, "limits", limits)
    await desk.monitor(desk.job)
    found = desk.dispatcher.jobs.get(desk.job.id)
    assert found is not None
    assert (found.status, found.crashes) == ("queued", 1)


async def test_a_start_that_failed_when_its_process_lived_leaves_none(desk: Desk) -> None:
    """Its supervisor has claimed the attempt; the watch on it could not be set up, say."""
    sleep = [sys.executable, "-c", "import time; time.sleep(999)"]
    with subprocess.Popen(sleep, start_new_session=True) as supervisor:
        desk.dispatcher.attempts.attempt_dir(desk.job).claim(process_ref(supervisor.pid))
        desk.faults = repeat(OSError(errno.EMFILE, "Too many open files"))
        desk.dispatcher.room_seconds = 0.3
        assert (await desk.launch()).status == "paused"
        assert supervisor.wait() == -signal.SIGKILL


async def test_row_115_a_template_is_kept_when_its_client_lacks_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "light.py").write_text("import fractions")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    local = LocalExecutor(ExecutorSettings("warm", tmp_path / "run"))
    key = ForkServerKey(sys.executable, ("light",), None)
    template = await local.fork_server(key)
    order = AttemptOrder(tmp_path, (), {}, sys.executable, preload=("light",))

    async def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "open_unix_connection", refuse)
    try:
        with pytest.raises(OSError, match="Too many"):
            await local.start(order, Placement((), 1))
        assert (await local.fork_server(key)).process.pid == template.process.pid
        assert template.process.returncode is None
    finally:
        await local.close()


async def test_a_start_that_fails_in_an_unknown_way_is_not_tried_for_ever(desk: Desk) -> None:
    desk.faults = repeat(RuntimeError("the cluster is gone"))
    job = await desk.launch()
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "worker_not_started"
    assert "the cluster is gone" in job.error.message
    assert desk.starts == 1
    assert not desk.monitored


async def test_the_devices_of_a_start_that_failed_stay_held_while_what_it_left_does_not_end(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(_: str) -> None:
        raise TimeoutError("the processes [1] were killed and do not end")

    released: list[str] = []
    monkeypatch.setattr(AttemptDir, "claim", lambda *_: "1:1:boot")
    monkeypatch.setattr(executor, "kill_session", stuck)
    monkeypatch.setattr(desk.dispatcher, "release", released.append)
    desk.faults = repeat(RuntimeError("no"))
    with pytest.raises(TimeoutError):
        await desk.launch()
    assert not released
    found = desk.dispatcher.jobs.get(desk.job.id)
    assert found is not None
    assert found.status == "running"
