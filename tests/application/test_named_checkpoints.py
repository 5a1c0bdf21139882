"""Whoever asks for a checkpoint by name hears of that one, however late the server takes what the trainer says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until_async

from arbor_core.application.services import ServerServices
from arbor_core.application.system import Arbor, open_system
from arbor_core.config.compose import serve_settings
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.records import Job, JobSpec, NewJob
from arbor_core.storage.event_log import EventLog
from arbor_core.types import CheckpointEvent, MessageEvent

LOOKS = 3


@pytest.fixture
def arbor(tmp_path: Path) -> Iterator[Arbor]:
    """A server's parts, of which nothing runs."""
    system = open_system(serve_settings(f"storage={tmp_path}", "executor=mock", "allocator=mock", "inference=mock"))
    yield system
    system.store.close()
    system.lock.close()


async def running(arbor: Arbor) -> Job:
    """A job that learns from rollouts, whose trainer runs."""
    spec = JobSpec("mock_grpo", "grpo", {}, model="m", model_path="m", seed=1, input="rollouts")
    job = await arbor.jobs.create(NewJob("me", "", None, None, {}, spec))
    await arbor.jobs.transition(job, "queued")
    begun = await arbor.jobs.transition(arbor.jobs.get(job.id) or job, "running", attempt=1)
    assert begun is not None
    return begun


async def test_a_name_that_was_given_before_is_not_answered_with_what_it_was(
    arbor: Arbor, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await running(arbor)
    files = JobDir.of(arbor.models.root, job.id)
    log = EventLog(files.attempt(1).events)
    log.append(CheckpointEvent("", step=1, dir="1-1", name="best", metadata={"score": 1}))
    job = await arbor.dispatcher.monitor.ingest.collect(job)
    services = ServerServices(arbor)
    looks: list[int] = []
    really = services.changed

    async def changed(*args: object) -> int:
        looks.append(1)
        return await really(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(services, "changed", changed)
    asking = asyncio.create_task(services.checkpoint(job.id, "me", "best", {"score": 2}, 120.0))
    request = files.checkpoint_requests / "best.json"
    await until_async(request.exists)
    log.append(CheckpointEvent("", step=2, dir="2-1", name="best", metadata={"score": 2}))
    request.unlink()  # as the trainer does then
    looks.clear()
    await arbor.jobs.add_event(MessageEvent("something else happens"), job.id)
    await until_async(lambda: asking.done() or len(looks) >= LOOKS)
    assert not asking.done(), "the server has not heard of the checkpoint yet"
    await arbor.dispatcher.monitor.ingest.collect(job)
    found = await asking
    assert (found.step, found.metadata) == (2, {"score": 2})
