"""The session of a job that executes commands: sent once, executed in order, answered once, acknowledged once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbor_core.commands import session as session_module
from arbor_core.commands.session import Session
from arbor_core.jobdir.inbox import Inbox
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobdir.results import Results
from arbor_core.jobs.records import Job, JobSpec
from arbor_core.storage import synced_log
from arbor_core.types import ApiError, Command, Result, Sent
from arbor_core.worker.inbox_reader import CommandFeed

OPEN = Callable[[], Awaitable[Session]]


class Trainer:
    """Takes commands and answers them, in the test's own thread."""

    def __init__(self, folder: JobDir) -> None:
        self.folder = folder
        self.feed, self.results, self.after = CommandFeed(folder.inbox), Results(folder.results), 0
        self.session: Session | None = None
        """The one that it wakes."""

    def take(self) -> list[Command]:
        found = self.feed.take(self.after, 0)
        self.after += len(found)
        return found

    def work(self, prefix: bytes = b"done: ") -> None:
        for command in self.take():
            self.results.answer(command, prefix + command.payload)
        if self.session:
            self.session.woken.set()  # as the server does when it is woken


@pytest.fixture
def row() -> Job:
    spec = JobSpec("mock", "mock", {}, model="m", model_path=None, seed=1)
    empty: dict[str, Any] = dict.fromkeys(Job.__struct_fields__)
    values = {"id": "ftjob-1", "status": "running", "desired": "run", "spec": spec, "preempted": 0}
    return Job(**{**empty, **values})


@pytest.fixture
async def opened(tmp_path: Path, row: Job) -> AsyncIterator[OPEN]:
    """Opens the job's session, as often as servers start."""
    sessions: list[Session] = []

    async def open_() -> Session:
        for before in sessions:
            before.close()
        sessions[:] = [await Session.opened(JobDir(tmp_path), lambda: row)]
        return sessions[0]

    yield open_
    for session in sessions:
        session.close()


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(JobDir(tmp_path))


async def test_commands_are_taken_by_number_and_answered(opened: OPEN, trainer: Trainer) -> None:
    session = await opened()
    for number in (2, 3):
        await session.send(b"%d" % number, number)
    assert trainer.take() == [], "the first one has not come"
    assert await session.result(1) is None
    await session.send(b"1", 1)
    trainer.work()
    assert [result.payload for result in await session.follow(0)] == [b"done: 1", b"done: 2", b"done: 3"]
    assert await session.result(2) == Result(2, b"done: 2")
    assert session.answered == 3


async def test_the_same_again_changes_nothing_and_another_is_refused(opened: OPEN, trainer: Trainer) -> None:
    session = await opened()
    both = await asyncio.gather(session.send(b"one", 1), session.send(b"one", 1))
    assert sorted(sent.repeated for sent in both) == [False, True]
    refused = await asyncio.gather(*(session.send(b"other", n) for n in (1, 1)), return_exceptions=True)
    assert [getattr(error, "code", None) for error in refused] == ["command_number_reuse"] * 2
    session = await opened()
    assert (await session.send(b"one", 1)).repeated
    with pytest.raises(ApiError, match="used for another"):
        await session.send(b"other", 1)
    assert [command.payload for command in trainer.take()] == [b"one"]


async def test_two_at_once_under_one_number_are_not_both_taken(opened: OPEN, trainer: Trainer) -> None:
    session = await opened()
    both = await asyncio.gather(session.send(b"a", 1), session.send(b"b", 1), return_exceptions=True)
    assert [isinstance(one, ApiError) for one in both] == [False, True]
    assert [command.payload for command in trainer.take()] == [b"a"]


@pytest.mark.parametrize("number", [0, -1, 1 << 63])
async def test_a_number_that_is_none_is_refused(opened: OPEN, number: int) -> None:
    with pytest.raises(ApiError) as refused:
        await (await opened()).send(b"", number)
    assert (refused.value.status, refused.value.param) == (400, "number")


async def test_a_client_waits_for_its_result_and_for_no_other(opened: OPEN, trainer: Trainer) -> None:
    session = trainer.session = await opened()
    second = asyncio.create_task(session.result(2, 60))
    follows = asyncio.create_task(session.follow(0, 60))
    await session.send(b"1", 1)
    trainer.work()
    assert [result.number for result in await follows] == [1]
    assert not second.done()
    await session.send(b"2", 2)
    trainer.work()
    assert await second == Result(2, b"done: 2")
    assert session.waiting == {}


async def test_a_lost_wakeup_costs_a_second_at_most(opened: OPEN, trainer: Trainer) -> None:
    session = await opened()
    await session.send(b"1", 1)
    waits = asyncio.create_task(session.result(1, 60))
    await asyncio.sleep(0)
    trainer.work()
    assert await waits == Result(1, b"done: 1")


async def test_a_wait_ends_in_time_and_with_the_job(opened: OPEN, row: Job) -> None:
    session = await opened()
    began = time.monotonic()
    assert await session.result(1, 0.05) is None
    assert list(await session.follow(0, 0.05)) == []
    assert time.monotonic() - began >= 0.1
    waits = asyncio.create_task(session.result(1, 600))
    await asyncio.sleep(0)
    row.status = "failed"
    assert await waits is None


async def test_a_job_that_ends_takes_no_commands(opened: OPEN, row: Job, trainer: Trainer) -> None:
    session = await opened()
    await session.send(b"1", 1)
    trainer.work()
    row.desired = "finish"
    with pytest.raises(ApiError, match="asked to finish"):
        await session.send(b"2", 2)
    assert (await session.send(b"1", 1)).repeated
    row.status = "succeeded"
    for ended in (session, await opened()):
        with pytest.raises(ApiError, match="has ended"):
            await ended.send(b"2", 2)
        assert await ended.result(1) == Result(1, b"done: 1")
        assert await ended.result(2, 600) is None
    await session.acknowledge(1)
    assert (await opened()).acknowledged == 1


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """While it is set, nothing that is appended to an inbox comes onto the disk."""
    full, append = Event(), Inbox.append

    def wait(inbox: Inbox, entries: Sequence[synced_log.Entry]) -> list[int]:
        while full.is_set():
            time.sleep(0.001)
        return append(inbox, entries)

    monkeypatch.setattr(Inbox, "append", wait)
    yield full
    full.clear()


async def test_no_command_is_taken_that_the_trainer_does_not_see_any_more(
    opened: OPEN, row: Job, trainer: Trainer, slow_disk: Event
) -> None:
    session = await opened()
    slow_disk.set()
    sending = asyncio.create_task(session.send(b"1", 1))
    await asyncio.sleep(0)
    assert 1 in session.sending, "it was let through while nobody had asked the job to finish"
    row.desired = "finish"
    assert not trainer.feed.has(1), "the trainer's last look"
    slow_disk.clear()
    again = asyncio.create_task(session.send(b"1", 1))
    await session.sending[1].position
    assert trainer.feed.has(1), "too late"
    row.status = "succeeded"
    for refused in (sending, again):
        with pytest.raises(ApiError, match="came too late") as caught:
            await refused
        assert (caught.value.status, caught.value.code) == (400, "invalid_job_state")


async def test_a_command_that_the_trainer_sees_at_its_last_look_is_taken(
    opened: OPEN, row: Job, trainer: Trainer, slow_disk: Event
) -> None:
    session = trainer.session = await opened()
    slow_disk.set()
    sending = asyncio.create_task(session.send(b"1", 1))
    await asyncio.sleep(0)
    row.desired = "finish"
    slow_disk.clear()
    await session.sending[1].position
    trainer.work()
    assert await sending == Sent(1)
    assert await session.send(b"1", 1) == Sent(1, repeated=True)
    assert await session.result(1) == Result(1, b"done: 1")


async def test_what_an_earlier_server_took_as_the_job_finished_is_not_promised_again(
    opened: OPEN, row: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "SETTLE_SECONDS", 0.05)
    await (await opened()).send(b"1", 1)
    row.desired = "finish"
    session = await opened()
    with pytest.raises(ApiError, match="not known yet") as caught:
        await session.send(b"1", 1)
    assert (caught.value.status, caught.value.headers) == (409, {"retry-after": "1"})
    row.status = "succeeded"
    with pytest.raises(ApiError, match="came too late"):
        await session.send(b"1", 1)


async def test_acknowledged_results_are_dropped_for_good(
    opened: OPEN, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.results.segment_bytes = 1
    session = await opened()
    for number in range(1, 6):
        await session.send(b"%d" % number, number)
    with pytest.raises(ApiError, match="results up to command 0"):
        await session.acknowledge(1)
    trainer.work()
    await session.acknowledge(3)
    await session.acknowledge(2)
    for again in (session, await opened()):
        assert again.acknowledged == 3
        assert set(again.places) == {4, 5}
        assert again.bytes == sum(place.end - place.start for place in again.places.values())
        for refused in (again.result(3), again.follow(2), again.send(b"3", 3)):
            with pytest.raises(ApiError, match="acknowledged"):
                await refused
        assert [result.number for result in await again.follow(3)] == [4, 5]
    assert len(synced_log.segments(tmp_path / "results")) == 2
    assert set(session.digests) == {4, 5}


async def test_what_a_server_did_not_come_to_drop_the_next_one_drops(
    opened: OPEN, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.results.segment_bytes = 1
    session = await opened()
    for number in range(1, 4):
        await session.send(b"", number)
    trainer.work()
    with monkeypatch.context() as dying:
        dying.setattr(session_module.results, "drop", lambda *_: None)
        await session.acknowledge(2)
    assert len(synced_log.segments(tmp_path / "results")) == 3
    await opened()
    assert len(synced_log.segments(tmp_path / "results")) == 1


async def test_too_much_is_refused_until_results_are_acknowledged(
    opened: OPEN, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "WINDOW", 3)
    session = await opened()
    for number in (3, 2, 1):
        await session.send(b"", number)
    with pytest.raises(ApiError) as refused:
        await session.send(b"", 4)
    assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "1"})
    assert (await session.send(b"", 3)).repeated
    trainer.work()
    await session.acknowledge((await session.follow(0))[0].number)
    await session.send(b"", 4)
    monkeypatch.setattr(session_module, "RESULT_BYTES", 1)
    await session.acknowledge(2)
    with pytest.raises(ApiError, match="bytes of results"):
        await session.send(b"", 5)
    await session.acknowledge(3)
    await session.send(b"", 5)


async def test_results_are_told_in_bites(opened: OPEN, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "FOLLOW_BYTES", 200)
    session = await opened()
    for number in range(1, 5):
        await session.send(bytes(60), number)
    trainer.work()
    assert [result.number for result in await session.follow(0)] == [1, 2]
    monkeypatch.setattr(session_module, "FOLLOW_BYTES", 1)
    assert [result.number for result in await session.follow(2)] == [3]


def open_files(folder: Path) -> list[str]:
    """The files below a folder that this process has open, each as often as it is."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except FileNotFoundError:  # of this listing
            continue
    return sorted(path for path in found if path.startswith(f"{folder}/"))


async def test_damaged_files_are_an_error_that_does_not_say_where(
    opened: OPEN, trainer: Trainer, tmp_path: Path, row: Job, caplog: pytest.LogCaptureFixture
) -> None:
    session = await opened()
    for number in (1, 2):
        await session.send(b"%d" % number, number)
    trainer.work()
    assert await session.result(1) == Result(1, b"done: 1")
    before = open_files(tmp_path)
    for name in ("results", "inbox"):
        ((_, path),) = synced_log.segments(tmp_path / name)
        content = path.read_bytes()
        path.write_bytes(content[:3] + bytes([content[3] ^ 1]) + content[4:])
        with pytest.raises(ApiError) as caught:
            await Session.opened(JobDir(tmp_path), lambda: row)
        assert (caught.value.status, caught.value.code) == (500, "storage_damaged")
        assert str(tmp_path) not in str(caught.value)
        assert f"jobs/{tmp_path.name}/{name} in the storage directory is damaged" in caplog.text
        if name == "results":
            with pytest.raises(ApiError, match="damaged"):
                await session.result(1)
        path.write_bytes(content)
    assert open_files(tmp_path) == before, "nothing stays open"


async def test_a_trainer_that_executes_again_changes_no_result(opened: OPEN, trainer: Trainer) -> None:
    session = await opened()
    await session.send(b"1", 1)
    trainer.work()
    assert await session.result(1) == Result(1, b"done: 1")
    trainer.results.close()
    again = Trainer(trainer.folder)
    await session.send(b"2", 2)
    again.work(b"otherwise: ")
    assert await session.result(1) == Result(1, b"done: 1")
    assert await session.result(2) == Result(2, b"otherwise: 2")
    reopened = await opened()
    assert [result.payload for result in await reopened.follow(0)] == [b"done: 1", b"otherwise: 2"]


def test_commands_are_taken_up_anew_from_a_checkpoint(tmp_path: Path) -> None:
    from arbor_core.jobdir.commands import entry
    from arbor_core.jobdir.inbox import Inbox

    box = Inbox(tmp_path / "inbox", segment_bytes=100)
    for number in (2, 1, 4, 5):
        box.append([entry(b"%d" % number, number)])
    feed = CommandFeed(tmp_path / "inbox")
    assert [command.number for command in feed.take(0, 0)] == [1, 2]
    box.append([entry(b"3", 3)])
    assert [command.payload for command in feed.take(2, 0)] == [b"3", b"4", b"5"]
    assert feed.take(5, 0) == []
    assert feed.places == {}
    assert [command.number for command in feed.take(1, 0)] == [2, 3, 4, 5]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(1, 9)), st.lists(st.integers(0, 8), max_size=12))
def test_whatever_order_they_come_in(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], again: list[int]
) -> None:
    """Sent in any order, some of them again, with the server and the trainer starting anew meanwhile."""
    folder = JobDir(tmp_path_factory.mktemp("job"))
    spec = JobSpec("mock", "mock", {}, model="m", model_path=None, seed=1)
    empty: dict[str, Any] = dict.fromkeys(Job.__struct_fields__)
    job = Job(**{**empty, "id": "ftjob-1", "status": "running", "desired": "run", "spec": spec, "preempted": 0})

    async def play() -> list[bytes]:
        trainer, executed = Trainer(folder), []
        session = await Session.opened(folder, lambda: job)
        for index, number in enumerate([*order, *order]):
            await session.send(b"%d" % number, number)
            executed += [command.payload for command in trainer.feed.take(len(executed), 0)]
            if index in again:
                session.close()
                session = await Session.opened(folder, lambda: job)
        session.close()
        trainer.results.close()
        return executed

    assert asyncio.run(play()) == [b"%d" % number for number in range(1, 9)]
