"""The feed of all jobs' changes: each once and in order, for readers that stop and go on anywhere."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arbor_core.jobs import feed as feeds
from arbor_core.jobs.feed import Change, Feed, GapError
from arbor_core.jobs.leases import end_leases, write_lease
from arbor_core.jobs.records import Job, JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.storage.database import Store
from arbor_core.types import (
    Bundle,
    CheckpointDiscarded,
    CheckpointEvent,
    CheckpointRequest,
    Claim,
    Device,
    Event,
    GroupsSkipped,
    HyperparametersResolved,
    Lease,
    MessageEvent,
    MetricsEvent,
    PolicyPublished,
)

OWNERS = ("acme", "zeta")
SEEN = {
    "job": "SELECT * FROM jobs WHERE id=?",
    "events": "SELECT max(seq) FROM events WHERE job_id=?",
    "checkpoints": "SELECT '', step, dir FROM checkpoints WHERE job_id=?1"
    " UNION ALL SELECT name, step, dir FROM named_checkpoints WHERE job_id=?1 ORDER BY 1, 2",
    "policy": "SELECT * FROM policies WHERE job_id=?",
    "lease": "SELECT * FROM leases WHERE owner=?",
}
"""What a reader can see of a job, by what a change says of it."""
UNSEEN = ("offset", "furthest", "progress", "crashes")
"""Columns of a job's row that change with its events and checkpoints, and that nobody outside is shown."""


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = Store(tmp_path / "arbor.db")
    yield opened
    opened.close()


def new_job(owner: str) -> NewJob:
    return NewJob(owner, "file-x", None, None, {}, JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1))


def look(store: Store, job_id: str) -> dict[str, Any]:
    """All that can be seen of a job."""
    found: dict[str, Any] = {what: [tuple(row) for row in store.read(sql, job_id)] for what, sql in SEEN.items()}
    row = store.one(SEEN["job"], job_id)
    found["job"] = {name: row[name] for name in row.keys() if name not in UNSEEN} if row else None  # noqa: SIM118
    return found


class World:
    """Jobs that change at random."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store, self.jobs, self.draw = store, Jobs(store), random.Random(seed)
        self.known: list[str] = []
        self.owners: dict[str, str] = {}

    async def step(self) -> None:
        """One change, or one that comes to nothing."""
        if not self.known or self.draw.random() < 0.1:
            owner = self.draw.choice(OWNERS)
            job = await self.jobs.create(new_job(owner))
            self.known.append(job.id)
            self.owners[job.id] = owner
            return
        job_id = self.draw.choice(self.known)
        job = self.jobs.get(job_id)
        assert job
        before = look(self.store, job_id)
        number = self.jobs.feed.newest
        await self.draw.choice(self.actions(job))()
        noted = self.jobs.feed.page(number).changes
        after = look(self.store, job_id)
        different = {what for what in SEEN if before[what] != after[what]}
        assert different <= {change.what for change in noted}, "something has changed and was not noted"
        assert {change.job_id for change in noted} <= {job_id}

    def actions(self, job: Job) -> list[Callable[[], Any]]:
        jobs, draw = self.jobs, self.draw
        lease = Lease(f"lease-{job.id}", Claim(job.id, (Bundle("train", 1),)), ((Device("mock:0", "mock"),),))

        def ingest(*events: Event) -> Callable[[], Any]:
            return lambda: jobs.ingest(job, events, job.offset + draw.randrange(2), "m")

        step = draw.randrange(5)
        return [
            lambda: jobs.transition(job, draw.choice(("queued", "running", "paused")), MessageEvent("moved")),
            lambda: jobs.transition(job, "running", attempt=job.attempt + 1, also=lambda db: write_lease(db, lease)),
            lambda: jobs.transition(job, "queued", ref=None, also=lambda db: end_leases(db, job.id, "cancelled")),
            lambda: jobs.preempt(job.id),
            lambda: jobs.set_desired(job.id, draw.choice(("run", "pause", "finish"))),
            lambda: jobs.note_ref(job, f"ref-{draw.randrange(9)}"),
            lambda: jobs.add_event(MessageEvent("said"), job.id),
            ingest(MetricsEvent(step=1, total_steps=9, values={"train_loss": 1.0}), MessageEvent("and more")),
            ingest(CheckpointEvent(step=step, dir=f"{step}-1", name=draw.choice((None, "best")))),
            ingest(CheckpointDiscarded(dir=f"{step}-1")),
            ingest(PolicyPublished(version=step, handled=step, dir=f"{step}-1"), GroupsSkipped(handled=step + 1)),
            ingest(HyperparametersResolved(hyperparameters={"n_epochs": step})),
            lambda: jobs.reconcile(job, [CheckpointEvent(step=step, dir=f"{step}-1")], "m"),
            lambda: self.name_last(job),
        ]

    async def name_last(self, job: Job) -> None:
        for last in self.jobs.checkpoints(job.id, 1):
            await self.jobs.name_checkpoint(job.id, CheckpointRequest("last", {}), last)


class Reader:
    """Reads a few pages, forgets all but a number, and goes on from there another time."""

    def __init__(self, store: Store, draw: random.Random, owner: str | None) -> None:
        self.store, self.draw, self.owner = store, draw, owner
        self.position = 0
        self.read: list[Change] = []

    def go_on(self) -> None:
        feed = Feed(self.store)  # that of a server which has just started
        for _ in range(self.draw.randrange(4)):
            page = feed.page(self.position, self.owner, limit=self.draw.randrange(1, 6))
            self.read += page.changes
            self.position = page.position

    def finish(self) -> None:
        while (page := Feed(self.store).page(self.position, self.owner)).position != self.position:
            self.read += page.changes
            self.position = page.position


@pytest.mark.parametrize("seed", range(4))
async def test_readers_see_each_change_once_and_in_order(store: Store, seed: int) -> None:
    world = World(store, seed)
    readers = [Reader(store, world.draw, owner) for owner in (None, None, *OWNERS)]
    for _ in range(150):
        await world.step()
        world.draw.choice(readers).go_on()
    every = Reader(store, world.draw, None)
    every.finish()
    assert [change.seq for change in every.read] == list(range(1, len(every.read) + 1))
    assert len(every.read) > 100
    for reader in readers:
        reader.finish()
        mine = [change for change in every.read if reader.owner in (None, world.owners[change.job_id])]
        assert reader.read == mine


async def test_what_is_undone_is_not_in_the_feed(store: Store) -> None:
    jobs = Jobs(store)

    def refuse(db: sqlite3.Connection, job: Job) -> None:
        raise RuntimeError("no")

    await jobs.create(new_job("acme"))
    number = jobs.feed.newest
    with pytest.raises(RuntimeError):
        await jobs.create(new_job("acme"), also=refuse)
    assert jobs.feed.newest == number
    job = await jobs.create(new_job("acme"))
    assert {change.job_id for change in jobs.feed.page(number).changes} == {job.id}


async def test_a_reader_that_comes_too_late_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "KEPT", 10)
    monkeypatch.setattr(feeds, "TRIM_EVERY", 4)
    jobs = Jobs(store)
    job = await jobs.create(new_job("acme"))
    for _ in range(30):
        await jobs.add_event(MessageEvent("said"), job.id)
    newest = jobs.feed.newest
    (kept,) = store.read("SELECT count(*) FROM changes")
    assert 10 <= kept[0] <= 14
    assert [change.seq for change in jobs.feed.page(newest - 10).changes] == list(range(newest - 9, newest + 1))
    for number in (0, newest - 20, newest + 1, -1, 1 << 63, -1 << 63):
        with pytest.raises(GapError):
            jobs.feed.page(number)
        await asyncio.wait_for(jobs.feed.wait(number, 600, "ftjob-another"), 120)  # it may have changed
    assert jobs.feed.page(newest).changes == []


async def test_a_reader_is_woken_for_its_job_and_not_for_others(store: Store) -> None:
    jobs = Jobs(store)
    mine, other = await jobs.create(new_job("acme")), await jobs.create(new_job("acme"))
    number = jobs.feed.newest
    waiting = asyncio.create_task(jobs.feed.wait(number, 600, mine.id))
    await asyncio.sleep(0)
    await jobs.add_event(MessageEvent("said"), other.id)
    assert not waiting.done()
    await jobs.add_event(MessageEvent("said"), mine.id)
    await asyncio.wait_for(waiting, 120)
    await asyncio.wait_for(jobs.feed.wait(number, 600, mine.id), 120)  # it has changed before: nothing to wait for
    assert jobs.feed.waiting == {}


async def test_a_change_wakes_though_its_caller_has_gone(store: Store) -> None:
    jobs = Jobs(store)
    job = await jobs.create(new_job("acme"))
    waiting = asyncio.create_task(jobs.feed.wait(jobs.feed.newest, 600, job.id))
    await asyncio.sleep(0)
    telling = asyncio.create_task(jobs.add_event(MessageEvent("said"), job.id))
    await asyncio.sleep(0)
    telling.cancel()
    await asyncio.wait_for(waiting, 120)
    assert jobs.events(job.id, 1)[0].message == "said"


async def test_slow_readers_hold_nothing(store: Store) -> None:
    """Each holds a number; pages are read when they are wanted, and only then."""
    jobs = Jobs(store)
    job = await jobs.create(new_job("acme"))
    number = jobs.feed.newest
    following = [jobs.feed.follow(number) for _ in range(100)]
    first = [asyncio.ensure_future(anext(one)) for one in following]
    await asyncio.sleep(0)
    for _ in range(feeds.PAGE + 50):
        await jobs.add_event(MessageEvent("said"), job.id)
    assert {(await one).changes[0].seq for one in first} == {number + 1}
    assert jobs.feed.waiting == {}
    read = [change.seq for change in (await first[0]).changes]
    while len(read) < feeds.PAGE + 50:
        read += [change.seq for change in (await anext(following[0])).changes]
    assert read == list(range(number + 1, number + feeds.PAGE + 51))


async def test_somebody_elses_changes_move_a_reader_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "PAGE", 10)
    jobs = Jobs(store)
    job = await jobs.create(new_job("acme"))
    for _ in range(25):
        await jobs.add_event(MessageEvent("said"), job.id)
    following = jobs.feed.follow(0, "zeta")
    page = await asyncio.wait_for(anext(following), 120)
    assert (page.changes, page.position) == ([], 10)


DYING = """
import asyncio, sys
from pathlib import Path
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.storage.database import Store

jobs = Jobs(Store(Path(sys.argv[1])))
spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
asyncio.run(jobs.create(NewJob("acme", "file-x", None, None, {}, spec)))
"""


def test_a_server_that_dies_before_it_wakes_anybody_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "arbor.db"
    store = Store(path)
    assert Feed(store).newest == 0
    for died in range(1, 3):
        env = {**os.environ, "ARBOR_CRASH_AT": "store.committed"}
        ran = subprocess.run([sys.executable, "-c", DYING, str(path)], env=env, check=False)
        assert ran.returncode == -signal.SIGKILL
        assert len({change.job_id for change in Feed(store).page(0).changes}) == died
    store.close()
