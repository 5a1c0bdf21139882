"""Requests go first, at the database and for threads; and yet what works in the background gets on."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from waiting import until_async

from arbor_core.storage import background
from arbor_core.storage.background import in_background, in_thread
from arbor_core.storage.database import BATCH, Store

MANY = 5 * BATCH
PATIENCE = 120.0


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    found = Store(tmp_path / "arbor.db")
    await found.write(lambda db: db.execute("CREATE TABLE done(what TEXT)"))
    yield found
    found.close()


def change(what: str, seconds: float = 0.0) -> Callable[[sqlite3.Connection], object]:
    def run(db: sqlite3.Connection) -> None:
        time.sleep(seconds)
        db.execute("INSERT INTO done VALUES(?)", (what,))

    return run


def asking(store: Store, there: list[str]) -> Callable[[sqlite3.Connection], object]:
    """A request's change, which notes in `there` what its transaction has changed when that is committed."""

    def run(db: sqlite3.Connection) -> None:
        def look(sql: str) -> None:
            if sql == "COMMIT" and not there:
                db.set_trace_callback(None)
                there.extend(done(store))

        db.execute("INSERT INTO done VALUES('request')")
        db.set_trace_callback(look)

    return run


async def held(store: Store) -> threading.Event:
    """Keep the writer busy until the event is set: what is written meanwhile waits. The last commit was a quick one."""
    begun, go_on = threading.Event(), threading.Event()
    store._writer.submit(lambda: begun.set() or go_on.wait(PATIENCE))
    store._commit_seconds = 0.0
    await until_async(begun.is_set)
    return go_on


def done(store: Store) -> list[str]:
    return [row[0] for row in store.read("SELECT what FROM done ORDER BY rowid")]


async def test_a_request_waits_for_few_of_those_in_the_background(store: Store) -> None:
    async with in_background():
        go_on = await held(store)
        others = [asyncio.create_task(store.write(change("other", 0.001))) for _ in range(MANY)]
        await asyncio.sleep(0)
    there: list[str] = []
    request = asyncio.create_task(store.write(asking(store, there)))
    await asyncio.sleep(0)
    go_on.set()
    await request
    assert there[0] == "request"
    assert len(there) < BATCH, "its commit waited for a whole batch of others"
    await asyncio.gather(*others)
    assert len(done(store)) == MANY + 1


async def test_a_request_that_comes_during_a_transaction_joins_it(store: Store) -> None:
    go_on = await held(store)
    requests, there = list[asyncio.Future[object]](), list[str]()
    loop, first = asyncio.get_running_loop(), threading.Event()

    def ask() -> None:
        requests.append(asyncio.ensure_future(store.write(asking(store, there))))
        loop.call_soon(first.set)

    def begin(db: sqlite3.Connection) -> None:
        loop.call_soon_threadsafe(ask)
        assert first.wait(PATIENCE)

    async with in_background():
        others = [asyncio.create_task(store.write(begin))]
        others += [asyncio.create_task(store.write(change("other", 0.001))) for _ in range(MANY)]
        await asyncio.sleep(0)
    go_on.set()
    await until_async(lambda: requests)
    await requests[0]
    assert there[0] == "request"
    assert len(there) < BATCH
    await asyncio.gather(*others)


async def test_those_in_the_background_get_on_however_many_requests_there_are(store: Store) -> None:
    async with in_background():
        go_on = await held(store)
        others = [asyncio.create_task(store.write(change("other"))) for _ in range(20)]
        await asyncio.sleep(0)
    ended = asyncio.gather(*others)

    async def client() -> None:
        while not ended.done():
            await store.write(change("request", 0.002))

    clients = [asyncio.create_task(client()) for _ in range(4)]
    go_on.set()
    await asyncio.wait_for(ended, PATIENCE)
    await asyncio.gather(*clients)


async def test_a_change_that_fails_among_others_fails_alone(store: Store) -> None:
    def fail(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO done VALUES('half')")
        raise ValueError("no")

    go_on = await held(store)
    tasks = [asyncio.create_task(store.write(one)) for one in (change("a"), fail, change("b"))]
    await asyncio.sleep(0)
    go_on.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in ended] == [type(None), ValueError, type(None)]
    assert done(store) == ["a", "b"]


async def test_no_request_waits_for_a_thread_of_the_background() -> None:
    go_on = threading.Event()
    async with in_background():
        waiting = [asyncio.create_task(in_thread(go_on.wait, PATIENCE)) for _ in range(2 * background.THREADS)]
        await asyncio.sleep(0)
        outside = asyncio.get_running_loop().run_in_executor(None, threading.current_thread)
        assert not (await asyncio.wait_for(outside, PATIENCE / 2)).name.startswith("background")
        assert (await asyncio.wait_for(asyncio.to_thread(threading.get_ident), PATIENCE / 2)) != threading.get_ident()
        go_on.set()
        assert all(await asyncio.gather(*waiting))
    assert not background.is_background()
    assert not any(one.name.startswith("background") for one in threading.enumerate()), "its threads end with it"
