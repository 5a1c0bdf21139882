"""The session of a job that learns from rollouts: credits, repeated groups, and that a restart changes nothing."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbor_core.jobdir.groups import read
from arbor_core.jobdir.layout import JobDir
from arbor_core.rollouts import credits as credits_module
from arbor_core.rollouts.credits import Spans
from arbor_core.rollouts.session import Session
from arbor_core.types import UNNUMBERED, Accepted, ApiError, Group, Policy, Rollout, RolloutConfig

START = Policy()


def config(groups_per_step: int = 1, max_staleness: int = 1, offer_seconds: float = 600.0) -> RolloutConfig:
    return RolloutConfig(
        num_generations=2,
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        max_group_age=None,
        temperature=1.0,
        offer_seconds=offer_seconds,
    )


def group(id: int, reward: float = 0.0) -> Group:
    return Group(id=id, rollouts=(Rollout(reward=reward), Rollout(trajectory=1, reward=1.0)), version=0)


class OpenSession:
    """The session of a job whose trainer has got as far as each call says."""

    def __init__(self, folder: Path, config: RolloutConfig) -> None:
        self.policy = START
        self.session = Session(JobDir(folder), config, lambda: self.policy)
        self.folder, self.inbox, self.close = self.session.folder, self.session.writer.inbox, self.session.close

    @property
    def received(self) -> int:
        return self.session.received

    @property
    def latest(self) -> dict[int, tuple[int, int]]:
        return self.session.credits.latest

    def pending(self, policy: Policy) -> list[int]:
        self.policy = policy
        return self.session.pending()

    def sampled_at(self, batch_id: int, policy: Policy) -> int:
        self.policy = policy
        return self.session.sampled_at(batch_id)

    async def send(self, group: Group, digest: int, policy: Policy) -> Accepted:
        self.policy = policy
        return await self.session.send(group, digest)

    async def known(self, batch_id: int, digest: int) -> Accepted | None:
        return await self.session.known(batch_id, digest)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[OpenSession]:
    opened = OpenSession(tmp_path, config())
    yield opened
    opened.close()


@pytest.mark.parametrize(("staleness", "per_step", "window"), [(0, 1, 1), (1, 1, 2), (0, 4, 4), (2, 3, 9)])
async def test_credits_are_what_a_step_needs_times_how_far_ahead(
    tmp_path: Path, staleness: int, per_step: int, window: int
) -> None:
    session = OpenSession(tmp_path, config(per_step, staleness))
    assert session.pending(START) == list(range(window))
    for number in range(window):
        await session.send(group(number), number, START)
    assert session.pending(START) == []
    assert session.pending(Policy(1, per_step)) == list(range(window, window + per_step))
    session.close()


async def test_row_87_strictly_on_policy_nothing_is_offered_before_the_step_is_made(tmp_path: Path) -> None:
    session = OpenSession(tmp_path, config(1, 0))
    await session.send(group(0), 1, START)
    assert session.pending(START) == []
    assert session.pending(Policy(1, 1)) == [1]
    assert session.sampled_at(1, Policy(1, 1)) == 1
    session.close()


async def test_an_offer_that_nobody_takes_is_made_again_under_another_id(
    session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.pending(START) == [0, 1]
    now = credits_module.time.monotonic()
    monkeypatch.setattr(credits_module.time, "monotonic", lambda: now + 601)
    assert session.pending(START) == [2, 3]
    late = await session.send(group(0), 1, START)
    assert not late.repeated, "whoever comes late is welcome"


async def test_row_87_the_same_group_again_changes_nothing(session: OpenSession) -> None:
    first = await session.send(group(0), 7, START)
    again = await session.send(group(0), 7, START)
    assert (again.id, again.position, again.repeated) == (0, first.position, True)
    with pytest.raises(ApiError, match="used for another group"):
        await session.send(group(0, 1.0), 8, START)
    assert len(list(read(session.folder, 0))) == 1


async def test_the_same_group_twice_at_once(session: OpenSession) -> None:
    answers = await asyncio.gather(*(session.send(group(0), 7, START) for _ in range(4)))
    assert sorted(answer.repeated for answer in answers) == [False, True, True, True]
    assert len(list(read(session.folder, 0))) == 1


async def test_row_87_an_offered_id_is_taken_however_many_were_used_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_module, "REMEMBERED", 4)
    session = OpenSession(tmp_path, config())
    late = session.pending(START)[0]
    for number in range(12):
        policy = Policy(number, number)
        (other,) = set(session.pending(policy)) - {late}
        await session.send(group(other), other, policy)
    for opened in (session, OpenSession(tmp_path, config())):
        with pytest.raises(ApiError, match="too long ago") as caught:
            await opened.send(group(2), 2, policy)
        assert (caught.value.status, caught.value.code) == (400, "batch_id_reuse")
        assert await opened.known(late, 77) is None, "it was never used"
        assert (await opened.send(group(12), 12, policy)).repeated
    assert late in session.pending(policy)
    accepted = await session.send(group(late), 77, policy)
    assert not accepted.repeated
    assert [record.group.id for record in read(session.folder, accepted.position)] == [late]
    assert (await session.send(group(late), 77, policy)).repeated
    session.close()
    opened.close()


async def test_row_87_ids_that_nobody_can_have_been_offered(session: OpenSession) -> None:
    for number in (credits_module.AHEAD + 2, 1 << 60):
        with pytest.raises(ApiError, match="never offered") as caught:
            await session.send(group(number), 1, START)
        assert caught.value.code == "step_out_of_order"


async def test_groups_without_ids_take_credits_and_then_wait(
    session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_module, "WAITING", 3)
    taken = [(await session.send(group(UNNUMBERED), n, START)).id for n in range(5)]
    assert taken == [0, 1, UNNUMBERED, UNNUMBERED, UNNUMBERED]
    with pytest.raises(ApiError, match="wait to be trained on") as caught:
        await session.send(group(UNNUMBERED), 9, START)
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})


async def test_a_full_disk_refuses_each_group_and_keeps_the_credits(
    session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(session.inbox, "append", full)
        answers = await asyncio.gather(*(session.send(group(n), n, START) for n in range(2)), return_exceptions=True)
        assert all(isinstance(answer, OSError) for answer in answers)
    assert session.pending(START) == [0, 1]
    assert (await session.send(group(0), 0, START)).position == 0


async def test_of_groups_that_arrive_at_once_the_disk_may_take_some(
    session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = session.inbox.append
    with monkeypatch.context() as patched:
        patched.setattr(session.inbox, "append", lambda groups: append(groups[:1]))
        first, second = await asyncio.gather(
            *(session.send(group(n), n, START) for n in range(2)), return_exceptions=True
        )
    assert not isinstance(first, BaseException)
    assert first.position == 0
    assert isinstance(second, OSError)
    assert second.errno == errno.ENOSPC
    assert session.pending(START) == [1]
    assert not (await session.send(group(1), 1, START)).repeated
    assert [record.group.id for record in read(session.folder, 0)] == [0, 1]


class Told:
    """What a client and a trainer have done, and a session that is opened anew now and then."""

    def __init__(self, folder: Path, per_step: int, staleness: int) -> None:
        self.folder, self.config = folder, config(per_step, staleness)
        self.session = OpenSession(folder, self.config)
        self.sent: dict[int, int] = {}
        self.unnumbered = self.trained = 0

    @property
    def policy(self) -> Policy:
        return Policy(self.trained, self.trained * self.config.groups_per_step)

    async def do(self, what: str, number: int) -> None:
        if what == "restart":
            self.session.close()
            self.session = OpenSession(self.folder, self.config)
        elif what == "train" and (self.trained + 1) * self.config.groups_per_step <= len(self.sent) + self.unnumbered:
            self.trained += 1
        elif what == "repeat" and self.sent:
            id, digest = sorted(self.sent.items())[number % len(self.sent)]  # noqa: A001
            assert (await self.session.send(group(id), digest, self.policy)).repeated
        elif what == "send" and (offered := self.session.pending(self.policy)):
            id = offered[number % len(offered)]  # noqa: A001
            assert not (await self.session.send(group(id), number, self.policy)).repeated
            self.sent[id] = number
        elif what == "unnumbered":
            accepted = await self.session.send(group(UNNUMBERED), number, self.policy)
            if accepted.id == UNNUMBERED:
                self.unnumbered += 1
            else:
                self.sent[accepted.id] = number

    def check(self) -> None:
        offered = self.session.pending(self.policy)
        window = self.config.groups_per_step * (1 + self.config.max_staleness)
        assert not self.sent.keys() & set(offered), "an id that was used is never offered again"
        open_ = len(self.sent) + self.unnumbered - self.policy.handled
        assert len(offered) == max(0, window - open_), "as many credits as the trainer has room for"
        assert self.session.received == len(self.sent) + self.unnumbered


WHAT = st.tuples(st.sampled_from(["send", "send", "train", "restart", "repeat", "unnumbered"]), st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(per_step=st.integers(1, 3), staleness=st.integers(0, 2), deeds=st.lists(WHAT, max_size=25))
def test_a_session_is_a_function_of_its_inbox(per_step: int, staleness: int, deeds: list[tuple[str, int]]) -> None:
    async def all_of_it(folder: Path) -> None:
        told = Told(folder, per_step, staleness)
        for what, number in deeds:
            await told.do(what, number)
            told.check()
        before = (told.session.received, dict(told.session.latest))
        await told.do("restart", 0)
        assert (told.session.received, told.session.latest) == before
        assert len(list(read(told.session.folder, 0))) == before[0]
        told.session.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(all_of_it(Path(folder)))


# --- a set of whole numbers that takes as much memory as it has gaps


@given(numbers=st.lists(st.integers(0, 30)))
def test_it_holds_what_was_added_and_nothing_else(numbers: list[int]) -> None:
    spans = Spans()
    for number in numbers:
        spans.add(number)
    assert {number for number in range(-1, 33) if number in spans} == set(numbers)
    assert spans.edges == sorted(set(spans.edges)), "neighbours are one span"


def test_a_row_takes_two_numbers_however_it_came() -> None:
    spans = Spans()
    for number in [*range(0, 10_000, 2), *range(9_999, 0, -2)]:
        spans.add(number)
    assert spans.edges == [0, 10_000]
