"""Clients that wait for news of the same job: one look for all of them, and none of them misses anything."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from arbor_core.http import ApiError, LongPoll

pytestmark = pytest.mark.asyncio
KEY = ("job", "owner", "records")


class State(NamedTuple):
    """How a job stands."""

    version: int
    pending: list[int]
    looks: int = 0


class World:
    """One job whose state the test sets, and how often it was looked at."""

    def __init__(self) -> None:
        self.looks = 0
        self.version, self.pending = 0, [0]
        self.gone = False
        self.numbers: list[int | None] = []
        self.news = LongPoll(self.look, lambda before, now: before[:2] != now[:2], self.changed, 0.25)

    def now(self) -> State:
        return State(self.version, self.pending, self.looks)

    async def changed(self, job_id: str, owner: str, seconds: float, after: int | None = None) -> int:
        assert (job_id, owner) == KEY[:2]
        self.numbers.append(after)
        await asyncio.sleep(min(seconds, 0.01))
        return len(self.numbers)

    async def look(self, job_id: str, owner: str, style: str) -> State:
        assert (job_id, owner, style) == KEY
        if self.gone:
            raise ApiError(404, "Could not find it", "fine_tune_not_found")
        self.looks += 1
        return self.now()

    async def waiters(self, count: int, seconds: float = 30) -> list[asyncio.Task[State | None]]:
        before = self.now()
        found = [asyncio.create_task(self.news.next(*KEY, before, seconds)) for _ in range(count)]
        await asyncio.sleep(0)
        return found


async def test_one_look_for_all_and_all_hear() -> None:
    world = World()
    waiting = await world.waiters(200)
    while world.looks < 3:
        await asyncio.sleep(0)
    world.version, looks = 1, world.looks
    heard = await asyncio.gather(*waiting)
    assert {status.version for status in heard if status} == {1}
    assert None not in heard
    assert world.looks == looks + 1
    assert not world.news.watches
    assert world.numbers == [None, *range(1, len(world.numbers))], "it waits on from the number that it was given"


async def test_a_batch_id_is_news_and_so_is_what_came_before_the_first_look() -> None:
    world = World()
    before = world.now()
    world.pending = [1]
    found = await world.news.next(*KEY, before, 30)
    assert found
    assert found.pending == [1]


async def test_what_came_before_it_began_to_wait_is_told_at_once() -> None:
    async def forever(job_id: str, owner: str, seconds: float, after: int | None = None) -> int:
        await asyncio.sleep(seconds)
        return 1

    world = World()
    world.news.changed, world.news.latest = forever, 600.0
    before, world.version = world.now(), 1
    found = await asyncio.wait_for(world.news.next(*KEY, before, 600), 120)
    assert found
    assert found.version == 1


async def test_each_waits_as_long_as_it_wants() -> None:
    world = World()
    (long,) = await world.waiters(1)
    assert await world.news.next(*KEY, world.now(), 0.02) is None
    assert not long.done()
    long.cancel()  # a client that leaves
    (other,) = await world.waiters(1)
    world.version = 1
    assert (await other) is not None


async def test_nobody_looks_when_nobody_waits() -> None:
    world = World()
    await world.news.next(*KEY, world.now(), 0.05)
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
