"""Clients that wait for news of the same job: one look for all of them, and none of them misses anything."""

from __future__ import annotations

import asyncio

import pytest
from arbor_grpo.api.long_poll import StatusPolls
from arbor_grpo.api.status import Groups, GRPOStatus, Style

from arbor_core.types import ApiError

pytestmark = pytest.mark.asyncio
KEY = ("job", "owner", "records")


class World:
    """One job whose state the test sets, and how often it was looked at."""

    def __init__(self) -> None:
        self.looks = 0
        self.version, self.pending = 0, [0]
        self.gone = False
        self.news = StatusPolls(self.look, self.changed)

    def now(self) -> GRPOStatus:
        return GRPOStatus(
            job_id="job",
            status="running",
            current_model="job",
            checkpoints={},
            last_checkpoint=None,
            pending_batch_ids=self.pending,
            policy_version=self.version,
            groups=Groups(0, 0, 0),
        )

    async def changed(self, job_id: str, owner: str, seconds: float) -> None:
        assert (job_id, owner) == KEY[:2]
        await asyncio.sleep(min(seconds, 0.01))

    async def look(self, job_id: str, owner: str, style: Style) -> GRPOStatus:
        assert (job_id, owner, style) == KEY
        if self.gone:
            raise ApiError(404, "Could not find it", "fine_tune_not_found")
        self.looks += 1
        return self.now()

    async def waiters(self, count: int, seconds: float = 30) -> list[asyncio.Task[GRPOStatus | None]]:
        before = self.now()
        found = [asyncio.create_task(self.news.next(KEY, before, seconds)) for _ in range(count)]
        await asyncio.sleep(0)
        return found


async def test_one_look_for_all_and_all_hear() -> None:
    world = World()
    waiting = await world.waiters(200)
    while world.looks < 3:
        await asyncio.sleep(0)
    world.version, looks = 1, world.looks
    heard = await asyncio.gather(*waiting)
    assert {status.policy_version for status in heard if status} == {1}
    assert None not in heard
    assert world.looks == looks + 1
    assert not world.news.watches


async def test_a_batch_id_is_news_and_so_is_what_came_before_the_first_look() -> None:
    world = World()
    before = world.now()
    world.pending = [1]
    found = await world.news.next(KEY, before, 30)
    assert found
    assert found.pending_batch_ids == [1]


async def test_each_waits_as_long_as_it_wants() -> None:
    world = World()
    (long,) = await world.waiters(1)
    assert await world.news.next(KEY, world.now(), 0.02) is None
    assert not long.done()
    long.cancel()  # a client that leaves
    (other,) = await world.waiters(1)
    world.version = 1
    assert (await other) is not None


async def test_nobody_looks_when_nobody_waits() -> None:
    world = World()
    await world.news.next(KEY, world.now(), 0.05)
    assert world.looks
    while world.news.watches:
        await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1  # this one


async def test_a_job_that_is_gone() -> None:
    world = World()
    waiting = await world.waiters(3)
    world.gone = True
    heard = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in heard] == [ApiError] * 3
