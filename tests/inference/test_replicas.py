"""A model that several engines serve: real engine processes of the mock plugin."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import loaded, used
from waiting import until_async

from arbor_core import Weights
from arbor_core.application.chat_request import DECODER
from arbor_core.engine import EngineProcess
from arbor_core.inference.engines import Engines
from arbor_core.inference.replicas import CLEARLY_MORE, REMEMBERED, Conversations, next_number
from arbor_core.inference.weight_sync import WeightSync
from arbor_core.models.fine_tuned import FullPolicy, Resolved
from arbor_core.types import ApiError

ONE, TWO = (Resolved(name, name, f"/models/{name}") for name in ("one", "two"))


def engine(replica: int, users: int, started: bool = True) -> Any:
    return SimpleNamespace(key=SimpleNamespace(replica=replica), users=users, engine=started or None)


def test_a_request_goes_to_the_engine_with_the_fewest() -> None:
    choose = Conversations().choose
    assert choose(("m", "p"), None, [engine(0, 3), engine(1, 2), engine(2, 5)]).key.replica == 1
    assert choose(("m", "p"), None, [engine(0, 3), engine(1, 0, started=False)]).key.replica == 0
    assert choose(("m", "p"), None, [engine(0, 3, started=False), engine(1, 0, started=False)]).key.replica == 0


def test_a_conversation_stays_until_its_engine_has_clearly_more_or_is_gone() -> None:
    known = Conversations()

    def where(*replicas: Any, name: bytes = b"a") -> int:
        return int(known.choose(("m", "p"), name, replicas).key.replica)

    assert where(engine(0, 1), engine(1, 0)) == 1
    assert where(engine(0, 0), engine(1, CLEARLY_MORE)) == 1
    assert where(engine(0, 0), engine(1, CLEARLY_MORE), name=b"b") == 0
    assert where(engine(0, 0), engine(1, CLEARLY_MORE + 1)) == 0
    assert where(engine(0, 1), engine(1, 0)) == 0, "it stays where it went"
    assert where(engine(1, 0), engine(2, 1)) == 1, "its engine is gone"


def test_conversations_that_are_not_heard_of_are_forgotten() -> None:
    known = Conversations()
    for number in range(REMEMBERED + 10):
        known.choose(("m", "p"), b"%d" % number, [engine(0, 0)])
    assert len(known.replicas) == REMEMBERED
    assert ("m", "p", b"9") not in known.replicas


def test_engines_have_the_lowest_numbers_that_are_free() -> None:
    assert [next_number([engine(n, 0) for n in taken]) for taken in ([], [0], [1], [0, 1, 3])] == [0, 1, 0, 2]


def test_turns_of_a_conversation_have_one_key() -> None:
    def key(*messages: tuple[str, str], **more: str) -> bytes | None:
        said = [{"role": role, "content": text} for role, text in messages]
        return DECODER.decode(json.dumps({"model": "m", "messages": said, **more})).conversation()

    begin = [("system", "be brief"), ("user", "hello")]
    first = key(*begin)
    assert first == key(*begin, ("assistant", "hi"), ("user", "and?")) == key(*begin, ("assistant", "hello"))
    assert first not in (key(("user", "hello")), key(("system", "be brief"), ("user", "hello!")))
    assert key(*begin, prompt_cache_key="mine") == b"mine"
    assert key(("assistant", "x")) is not None


async def both(engines: Engines, resolved: Resolved = ONE) -> list[EngineProcess]:
    """Have both engines of a model started, and use them."""
    await used(engines, resolved)
    async with engines.using(resolved):
        async with engines.using(resolved):
            await until_async(lambda: len([one for one in engines.replicas(resolved) if one.engine]) == 2)
        async with AsyncExitStack() as stack:
            second = await stack.enter_async_context(engines.using(resolved))
            assert isinstance(second, EngineProcess)
    found = [one.engine for one in engines.replicas(resolved)]
    assert second is found[1], "the first was busy"
    return found  # type: ignore[return-value]


async def test_another_engine_is_started_when_all_are_busy_and_requests_are_spread(make: Any) -> None:
    engines = make(devices=3, replicas=2)
    for _ in range(3):
        await used(engines, ONE)
    assert engines.starter.count == 1, "one that is not busy is enough"
    first, second = await both(engines)
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(engines.using(ONE))
        assert [one.users for one in engines.replicas(ONE)] == [4, 4]
    assert (engines.starter.count, engines.starter.allocator.free()["engine"]) == (2, 1), "no more than two"
    assert first.spec.devices != second.spec.devices


async def test_the_operator_may_say_how_many_and_a_busy_model_takes_nobodys_device(make: Any) -> None:
    engines = make(devices=2, replicas=1, wanted={"o*": 3})
    await used(engines, TWO)
    async with engines.using(ONE), engines.using(ONE):
        await until_async(lambda: engines.failures.alone)
        async with engines.using(ONE):
            assert [model.key.name for model in engines.models.values()] == ["two", "one"]
    assert await used(engines, TWO)
    assert engines.starter.count == 2


async def test_the_death_of_one_engine_costs_only_its_own_requests(make: Any) -> None:
    engines = make(devices=2, replicas=2)
    first, second = await both(engines)
    os.killpg(first.process.pid, signal.SIGKILL)
    await until_async(lambda: len(engines.models) == 1)
    for _ in range(3):
        assert await used(engines, ONE) is second
    assert engines.starter.allocator.free()["engine"] == 1
    third = (await both_again(engines))[1]
    assert third not in (first, second)
    assert sorted(key.replica for key in engines.models) == [0, 1]


async def both_again(engines: Engines) -> list[Any]:
    async with engines.using(ONE), engines.using(ONE):
        await until_async(lambda: len([one for one in engines.replicas(ONE) if one.engine]) == 2)
    return [one.engine for one in engines.replicas(ONE)]


async def test_engines_with_shares_share_a_device_and_idle_ones_make_room_for_a_third(make: Any) -> None:
    engines = make(devices=1, share=0.4)
    one, two = await used(engines, ONE), await used(engines, TWO)
    assert one.spec.devices == two.spec.devices
    assert (one.spec.share, engines.starter.allocator.free()["engine"]) == (0.4, 0)
    await used(engines, Resolved("three", "three", "/models/three"))
    assert [model.key.name for model in engines.models.values()] == ["two", "three"]


async def test_two_engines_of_two_devices_and_a_share_serve_one_model(make: Any) -> None:
    engines = make(devices=2, share=0.5, replicas=2)
    engines.backends.default.options["devices"] = 2
    first, second = await both(engines)
    assert first.spec.devices == second.spec.devices
    assert len(first.spec.devices) == 2
    await engines.close()
    assert engines.starter.allocator.free()["engine"] == 2


def adapter(folder: Path, version: int) -> Resolved:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    name = f"job-a1-s{version}"
    return Resolved(name, ONE.base, ONE.base_path, Weights(name, str(folder)), "job", version)


class Jobs:
    """A job that publishes, as far as weight_sync looks at it."""

    def __init__(self) -> None:
        self.policy: Resolved | None = None

    def current(self, _: str) -> Resolved | None:
        return self.policy


async def test_a_policy_reaches_every_engine_and_none_answers_with_an_older_one(make: Any, tmp_path: Path) -> None:
    job: Any = Jobs()
    engines = make(devices=2, replicas=2, newest=job.current)
    live = WeightSync(job, engines, job)
    found = await both(engines)
    for version in (1, 2):
        job.policy = adapter(tmp_path / str(version), version)
        async with engines.serving(job.policy) as (_, resolved), engines.serving(job.policy) as (_, again):
            assert resolved == again == job.policy, "neither engine had it loaded"
        live.published("job")
        await asyncio.gather(*engines.background)
        for one in found:
            assert f"job-a1-s{version}" in await loaded(one)
    await until_async(lambda: not any(one.adapters.unloading for one in engines.models.values()))
    for one in found:
        assert await loaded(one) == ["job-a1-s2"]


async def test_weights_of_a_job_reach_every_engine_of_it(make: Any, tmp_path: Path) -> None:
    job: Any = Jobs()
    engines = make(devices=2, replicas=2, newest=job.current)
    live = WeightSync(job, engines, job)
    base = Resolved("job", "job", "/base", live="job", full=FullPolicy("/base", 0), began="one")
    await both(engines, base)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    job.policy = Resolved("job", "job", "/base", live="job", version=1, full=FullPolicy(str(tmp_path), 1), began="one")
    live.published("job")
    await asyncio.gather(*engines.background)
    assert [one.version for one in engines.models.values()] == [1, 1]
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    policy = FullPolicy(str(tmp_path), 2)
    job.policy = Resolved("job", "job", "/base", live="job", version=2, full=policy, began="one")
    with pytest.raises(ApiError, match="did not take new weights"):
        await used(engines, job.policy)
    assert len(engines.models) == 1
    assert len({one.version for one in engines.models.values()}) == 1
