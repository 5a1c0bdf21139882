"""A session is opened in a thread, once: however long its inbox is, nobody else waits for that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from arbor_core.jobdir import inbox
from arbor_core.jobdir.groups import entry
from arbor_core.jobdir.inbox import Inbox, InboxDamagedError
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.records import Job, JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.rollouts import session
from arbor_core.rollouts.session import OpenSessions, Session
from arbor_core.storage.database import Store
from arbor_core.types import ApiError, Group, Rollout

PATIENCE = 60.0
CONFIG = {
    "num_generations": 2,
    "groups_per_step": 1,
    "max_staleness": 1,
    "max_group_age": None,
    "temperature": 1.0,
    "offer_seconds": 600,
}


@dataclass
class Opening:
    """A job, and the sessions of a server."""

    jobs: Jobs
    job: Job
    sessions: OpenSessions
    files: JobDir

    def write(self, count: int, segment_bytes: int = inbox.SEGMENT_BYTES) -> None:
        """Put groups into the job's inbox."""
        box = Inbox(self.files.inbox, segment_bytes)
        rollout = Rollout(reward=1.0, prompt=b"\1\0\0\0", completion=b"abcd" * 10, logprobs=b"\0\0\0\0" * 10)
        for first in range(0, count, 100):
            numbers = range(first, min(first + 100, count))
            box.append([entry(Group(id=n, rollouts=(rollout, rollout), version=0), n) for n in numbers])
        box.close()


@pytest.fixture
async def opening(tmp_path: Path) -> AsyncIterator[Opening]:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    spec = JobSpec("mock_grpo", "grpo", CONFIG, model="m", model_path="m", seed=1, input="rollouts")
    job = await jobs.create(NewJob("me", "", None, None, {}, spec))
    sessions = OpenSessions(store, tmp_path)
    yield Opening(jobs, job, sessions, JobDir.of(tmp_path, job.id))
    sessions.close()
    store.close()


async def test_others_get_on_while_a_long_inbox_is_opened(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    opening.write(4_000, segment_bytes=1 << 14)
    assert len(inbox.segments(opening.files.inbox)) > 30
    headers, loop = inbox.headers, asyncio.get_running_loop()

    def from_a_slow_disk(path: Path) -> Iterator[inbox.Place]:
        """Nothing is read of a segment before somebody else has got on."""
        got_on = threading.Event()
        loop.call_soon_threadsafe(got_on.set)
        assert got_on.wait(PATIENCE), "nobody else gets on while a segment is read"
        yield from headers(path)

    monkeypatch.setattr(inbox, "headers", from_a_slow_disk)
    found = await opening.sessions.of(opening.job)
    assert found is not None
    assert found.received == 4_000


async def test_those_who_come_meanwhile_share_it(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[JobDir] = []

    class Counted(Session):
        def __init__(self, folder: JobDir, *rest: object) -> None:
            opened.append(folder)
            time.sleep(0.05)  # the others come meanwhile
            super().__init__(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "Session", Counted)
    opening.write(3)
    first, *others = (asyncio.create_task(opening.sessions.of(opening.job)) for _ in range(5))
    await asyncio.sleep(0)
    first.cancel()
    found = await asyncio.gather(*others)
    assert len(opened) == 1
    assert all(one is found[0] for one in found)
    assert await opening.sessions.of(opening.job) is found[0]


async def test_a_job_that_ends_meanwhile_has_no_session(opening: Opening) -> None:
    opening.write(3)
    task = asyncio.create_task(opening.sessions.of(opening.job))
    await asyncio.sleep(0)
    ended = await opening.jobs.transition(opening.job, "cancelled")
    assert ended is not None
    if not task.done():
        assert await task is None
    assert await opening.sessions.of(ended) is None
    assert opening.sessions.by_job == {}


async def test_a_group_that_comes_after_the_end_is_refused(opening: Opening) -> None:
    found = await opening.sessions.of(opening.job)
    assert found is not None
    ended = await opening.jobs.transition(opening.job, "cancelled")
    assert ended is not None
    assert await opening.sessions.of(ended) is None
    with pytest.raises(ApiError, match="it has ended"):
        await found.send(Group(id=0, rollouts=(), version=0), 0)


async def test_one_that_cannot_be_opened_is_tried_again(opening: Opening) -> None:
    opening.write(3)
    [(_, path)] = inbox.segments(opening.files.inbox)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 8)
    tasks = [asyncio.create_task(opening.sessions.of(opening.job)) for _ in range(2)]
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(error, InboxDamagedError)
    path.write_bytes(whole)
    found = await opening.sessions.of(opening.job)
    assert found is not None
    assert found.received == 3
