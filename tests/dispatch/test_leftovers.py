"""Whatever way a job ends, nothing half-written is left in its directory: by a writer that was killed, or by one that
the end comes upon."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import until_async

from arbor_core import ArborError, ExecutorSettings, Exit, PoolAllocator
from arbor_core.builtin.executor import LocalExecutor
from arbor_core.dispatch import attempts as attempts_module
from arbor_core.dispatch.attempts import Attempts
from arbor_core.dispatch.dispatcher import Dispatcher
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.monitor import Monitor
from arbor_core.dispatch.observers import Observers
from arbor_core.dispatch.outcome import Outcomes
from arbor_core.dispatch.validation import Validation
from arbor_core.jobs.records import Job, JobError, JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.plugins import Plugins
from arbor_core.storage.database import Store
from arbor_core.testing.invariants import leftovers
from arbor_core.types import TERMINAL

LEFT = (
    ".job.json.7.tmp",
    ".desired.7.tmp",
    "attempts/1/.order.json.7.tmp",
    "attempts/1/.keeper.7.tmp",
    "attempts/1/work/scratch",
    "checkpoints/4-1.tmp/weights",
    "checkpoints/named/.best.7.tmp",
    "weights/4-1.tmp/weights",
    "asked/.best.json.7.tmp",
)


@dataclass
class Desk:
    """A dispatcher, and one job in whose directory writers were killed."""

    root: Path
    jobs: Jobs
    dispatcher: Dispatcher
    job: Job

    async def move(self, to: Any, **changes: Any) -> Job:
        moved = await self.jobs.transition(self.job, to, **changes)
        assert moved
        self.job = moved
        return moved

    async def ask(self, desired: Any) -> Job:
        self.job = await self.jobs.set_desired(self.job.id, desired) or self.job
        return self.job

    @property
    def outcomes(self) -> Outcomes:
        return self.dispatcher.monitor.outcomes


@pytest.fixture
async def desk(tmp_path: Path, plugins: Plugins) -> AsyncIterator[Desk]:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    nobody: Any = None
    models: Any = SimpleNamespace(root=tmp_path)
    executor = LocalExecutor(ExecutorSettings("cold", tmp_path / "run"))
    files: Any = SimpleNamespace(stored_path=lambda name: f"files/{name}", path=lambda name: tmp_path / name)
    attempts = Attempts(jobs, files, models, executor, nobody, "storage_x", nobody, 1)
    ingest = Ingest(jobs, Observers(plugins), tmp_path, "arbor")
    outcomes = Outcomes(jobs, nobody, ingest, executor, tmp_path, nobody)
    trainers: Any = {
        "t": SimpleNamespace(
            python=None, preload=(), prove=None, check_row=None, model_check=None, min_rows=1, inspect=None
        )
    }
    made = Dispatcher(
        jobs,
        attempts,
        Validation(jobs, files, attempts, executor, trainers, nobody),
        Monitor(attempts, ingest, outcomes, executor, nobody),
        trainers,
        nobody,
        PoolAllocator({}),
        tmp_path / "bell",
        room_seconds=60,
    )
    spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
    job = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    yield Desk(tmp_path, jobs, made, job)
    store.close()


async def fails_validation(desk: Desk) -> None:
    await desk.dispatcher.validation._fail(desk.job, JobError("invalid_training_file", "no"))


async def is_cancelled_in_validation(desk: Desk) -> None:
    await desk.dispatcher.settle_idle(await desk.ask("cancel"))


async def is_cancelled_in_the_queue(desk: Desk) -> None:
    await desk.move("queued")
    await desk.dispatcher.settle_idle(await desk.ask("cancel"))


async def is_to_finish_before_it_began(desk: Desk) -> None:
    await desk.move("queued")
    await desk.dispatcher.settle_idle(await desk.ask("finish"))


async def is_cancelled_while_paused(desk: Desk) -> None:
    await desk.move("queued")
    await desk.move("running", attempt=1)
    await desk.move("paused")
    await desk.dispatcher.settle_idle(await desk.ask("cancel"))


async def needs_devices_that_there_are_not(desk: Desk) -> None:
    async def none(claim: Any) -> Any:
        raise ArborError("there are none")

    allocator: Any = SimpleNamespace(acquire=none)
    desk.dispatcher.allocator = allocator
    await desk.move("queued")
    await desk.dispatcher._start(desk.job.id)


async def does_not_start(desk: Desk) -> None:
    await desk.move("queued")
    await desk.outcomes.not_started(await desk.move("running", attempt=1), FileNotFoundError("no such interpreter"))


async def is_cancelled_while_it_runs(desk: Desk) -> None:
    await desk.move("queued")
    await desk.move("running", attempt=1)
    await desk.outcomes.settle(await desk.ask("cancel"), Exit(-15, 0.0))


async def tells_nonsense(desk: Desk) -> None:
    await desk.move("queued")
    await desk.outcomes.unreadable(await desk.move("running", attempt=1), ValueError("no JSON"))


WAYS = (
    fails_validation,
    is_cancelled_in_validation,
    is_cancelled_in_the_queue,
    is_to_finish_before_it_began,
    is_cancelled_while_paused,
    needs_devices_that_there_are_not,
    does_not_start,
    is_cancelled_while_it_runs,
    tells_nonsense,
)


@pytest.mark.parametrize("ends", WAYS, ids=lambda ends: ends.__name__)
async def test_nothing_is_left_of_a_job_that(ends: Callable[[Desk], Any], desk: Desk) -> None:
    folder = desk.dispatcher.attempts.dir(desk.job).path
    for name in LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert len(leftovers(desk.root)) == len(LEFT)
    await ends(desk)
    found = desk.jobs.get(desk.job.id)
    assert found is not None
    assert found.status in TERMINAL
    assert leftovers(desk.root) == []


async def test_a_job_that_is_cancelled_while_its_document_is_written_ends_after_that(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, written = threading.Event(), threading.Event(), attempts_module.replace

    def slow(path: Path, content: bytes) -> None:
        begun.set()
        assert go_on.wait(120)
        written(path, content)

    monkeypatch.setattr(attempts_module, "replace", slow)
    checking = asyncio.create_task(desk.dispatcher.validation.check(desk.job))
    await until_async(begun.is_set)
    settling = asyncio.create_task(desk.dispatcher.settle_idle(await desk.ask("cancel")))
    done, _ = await asyncio.wait({settling}, timeout=0.2)
    assert not done, "a server that died now would leave a draft in the directory of a job that has ended"
    go_on.set()
    await settling
    found = desk.jobs.get(desk.job.id)
    assert found is not None
    assert found.status == "cancelled"
    await checking
    assert leftovers(desk.root) == []


async def test_nothing_is_written_for_a_job_that_was_cancelled_before_its_validation(desk: Desk) -> None:
    await desk.ask("cancel")
    await desk.dispatcher.validation.check(desk.job)
    assert not desk.dispatcher.attempts.dir(desk.job).path.exists()
