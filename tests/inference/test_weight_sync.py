"""What a job's id means as a model, and how policies reach engines: real engine processes of the mock plugin."""

from __future__ import annotations

import asyncio
import functools
import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from engines import loaded
from waiting import until_async

from arbor_core import CheckpointEvent, PolicyPublished
from arbor_core.config.settings import ModelsConfig
from arbor_core.engine import EngineProcess
from arbor_core.inference.served_model import Key
from arbor_core.inference.weight_sync import WeightSync
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobdir.weights import KEPT, publishing, reading
from arbor_core.jobs.events import add_checkpoint
from arbor_core.jobs.policies import record_policy
from arbor_core.jobs.records import Job, JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.models.catalog import Models, add_model
from arbor_core.models.fine_tuned import FullPolicy, Resolved
from arbor_core.storage.database import Store
from arbor_core.types import ApiError, ArborError, EngineSpec, InputKind

TENSORS = (2).to_bytes(8, "little") + b"{}"


@dataclass
class World:
    """A storage directory without a server, and a trainer that publishes what it is told to."""

    store: Store
    root: Path
    models: Models = field(init=False)
    jobs: Jobs = field(init=False)

    def __post_init__(self) -> None:
        self.models = Models(self.store, ModelsConfig(dirs=[self.root / "models"], allow=[]), self.root)
        self.jobs = Jobs(self.store)

    async def job(
        self,
        *,
        input: InputKind = "rollouts",
        adapter: str | None = None,
        trains_adapter: bool | None = None,
        **config: Any,
    ) -> Job:
        values: dict[str, Any] = {"trainer": "t", "method": "grpo", "model": "base", "model_path": "/base", "seed": 1}
        spec = JobSpec(**values, config=config, input=input, adapter_path=adapter, trains_adapter=trains_adapter)
        return await self.jobs.create(NewJob("me", "", None, None, {}, spec))

    async def publish(
        self, job: Job, version: int, attempt: int = 1, *, full: bool = False, raw: bytes = TENSORS
    ) -> str:
        """Write a version and note it; returns its directory."""
        folder = self.root / "jobs" / job.id / "weights" / f"{version}-{attempt}"
        weights(folder, full, raw)
        event = PolicyPublished(version=version, handled=version, dir=folder.name)
        await self.store.write(lambda db: record_policy(db, job.id, event))
        return str(folder)

    async def checkpoint(self, job: Job, step: int, name: str | None = None) -> Path:
        folder = self.root / "jobs" / job.id / "checkpoints" / f"{step}-1"
        weights(folder, False, TENSORS)
        event = CheckpointEvent(step=step, dir=folder.name, name=name, at=1.0)
        await self.store.write(lambda db: add_checkpoint(db, job.id, event, f"ft:base:arbor::x:ckpt-step-{step}"))
        return folder


def weights(folder: Path, full: bool, raw: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not full:
        (folder / "adapter_config.json").write_text("{}")
    (folder / ("model.safetensors" if full else "adapter_model.safetensors")).write_bytes(raw)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    store = Store(tmp_path / "arbor.db")
    yield World(store, tmp_path)
    store.close()


@pytest.fixture
async def live(world: World, make: Any) -> WeightSync:
    return WeightSync(world.models.jobs, make(devices=2, newest=world.models.jobs.last), world.jobs)


async def test_a_job_that_learns_is_its_newest_policy(world: World) -> None:
    job = await world.job(lora={"r": 1})
    before = world.models.resolve(job.id, "me")
    assert (before.name, before.base_path, before.adapter, before.live, before.version) == (
        "base", "/base", None, job.id, 0,
    )  # fmt: skip
    await world.publish(job, 1)
    folder = await world.publish(job, 2)
    found = world.models.resolve(job.id, "me")
    assert (found.name, found.base, found.base_path, found.version) == (f"{job.id}-a1-s2", "base", "/base", 2)
    assert found.adapter is not None
    assert found.adapter.path == folder
    await world.publish(job, 1, attempt=2)
    assert world.models.resolve(job.id, "me") == found, "an attempt that makes a step again takes nothing back"
    with pytest.raises(ApiError, match="does not exist"):
        world.models.resolve(job.id, "somebody else")
    assert [(one.name, one.fine_tuned) for one in world.models.list("me")] == [(job.id, True)]
    assert world.models.get(job.id, "me").fine_tuned
    assert world.models.list("somebody else") == []
    with pytest.raises(ApiError, match="has not ended"):
        world.models.trainable(job.id, "me", adapters=True)


async def test_a_job_that_starts_from_an_adapter_is_that_at_first(world: World) -> None:
    job = await world.job(adapter="/adapter")
    found = world.models.resolve(job.id, "me")
    assert found.adapter is not None
    assert (found.name, found.adapter.path, found.version) == (f"{job.id}-a0-s0", "/adapter", 0)


@pytest.mark.parametrize("said", [{"trains_adapter": False}, {"lora": None}], ids=["declared", "earlier_version"])
async def test_a_job_that_trains_all_weights_has_an_engine_of_its_own(world: World, said: dict[str, Any]) -> None:
    job = await world.job(**said)
    first = world.models.resolve(job.id, "me")
    folder = await world.publish(job, 3, full=True)
    later = world.models.resolve(job.id, "me")
    assert (first.base, first.base_path) == (later.base, later.base_path) == (job.id, "/base")
    assert first.full is not None
    assert later.full is not None
    assert (first.full.path, first.full.version, later.full.path, later.full.version) == ("/base", 0, folder, 3)


async def test_what_the_trainer_says_of_a_job_counts_and_not_the_names_of_its_keys(world: World) -> None:
    job = await world.job(trains_adapter=True, lora=None)
    assert world.models.resolve(job.id, "me").base == "base"


async def test_an_ended_job_is_its_result_or_its_newest_checkpoint(world: World) -> None:
    job = await world.job()
    await world.publish(job, 2)
    await world.checkpoint(job, 1)
    folder = await world.checkpoint(job, 2)
    await world.jobs.transition(job, "failed")
    found = world.models.resolve(job.id, "me")
    assert found.adapter is not None
    assert (found.name, found.adapter.path, found.live) == ("ft:base:arbor::x:ckpt-step-2", str(folder), None)
    start = world.models.trainable(job.id, "me", adapters=True)
    assert (start.name, start.path, start.adapter) == ("base", "/base", f"jobs/{job.id}/checkpoints/{folder.name}")
    assert world.models.list("me") == []
    fields = {"owner": "me", "base": "base", "base_path": "/base", "job_id": "x", "path": "/result"}
    await world.store.write(lambda db: add_model(db, name="ft:base:arbor::r", kind="full", **fields))
    done = await world.job()
    await world.jobs.transition(done, "succeeded", fine_tuned_model="ft:base:arbor::r")
    assert world.models.resolve(done.id, "me").base_path == "/result"
    assert world.models.trainable(done.id, "me").name == "ft:base:arbor::r"
    untrained = await world.job()
    await world.jobs.transition(untrained, "cancelled")
    assert world.models.resolve(untrained.id, "me").base_path == "/base"


async def test_other_jobs_have_no_model_before_their_first_checkpoint(world: World) -> None:
    job = await world.job(input="file")
    with pytest.raises(ApiError, match="does not exist"):
        world.models.resolve(job.id, "me")
    await world.checkpoint(job, 4)
    assert world.models.resolve(job.id, "me").name == "ft:base:arbor::x:ckpt-step-4"


async def test_checkpoints_have_the_names_that_clients_gave(world: World) -> None:
    job = await world.job()
    folder = await world.checkpoint(job, 1, "best")
    await world.checkpoint(job, 2)
    found = world.models.resolve(f"{job.id}:best", "me")
    assert found.adapter is not None
    assert (found.adapter.path, found.live) == (str(folder), None)
    start = world.models.trainable(f"{job.id}:best", "me", adapters=True)
    assert start.adapter == f"jobs/{job.id}/checkpoints/{folder.name}"
    for name in (f"{job.id}:worst", f"{job.id}:", "ftjob-none:best", "ftjob-none"):
        with pytest.raises(ApiError, match="does not exist"):
            world.models.resolve(name, "me")
    with pytest.raises(ApiError, match="does not exist"):
        world.models.resolve(f"{job.id}:best", "somebody else")


async def engine_of(live: WeightSync, world: World, job: Job) -> EngineProcess:
    """Use a job's model for a moment."""
    async with live.engines.using(world.models.resolve(job.id, "me")) as engine:
        assert isinstance(engine, EngineProcess)
        return engine


async def published(live: WeightSync, job: Job) -> None:
    """Say that a version was published, and wait until that was dealt with."""
    live.published(job.id)
    await asyncio.gather(*live.engines.background)


async def version_of(engine: EngineProcess, model: str) -> int:
    """Which policy answers."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "return_token_ids": True}
    url = f"{engine.url}/v1/chat/completions"
    async with aiohttp.ClientSession(headers=engine.headers) as session, session.post(url, json=body) as answer:
        return int((await answer.json())["choices"][0]["policy_version"])


async def serves(engine: EngineProcess, *names: str) -> bool:
    """Whether an engine has these adapters loaded and no others."""
    return await loaded(engine) == [*names]


async def test_a_version_is_loaded_when_it_is_published_and_an_old_one_goes_when_nobody_runs_on_it(
    world: World, live: WeightSync
) -> None:
    job = await world.job()
    await world.publish(job, 1)
    await published(live, job)
    assert live.engines.models == {}, "nobody asked for an engine"
    first = world.models.resolve(job.id, "me")
    async with live.engines.using(first) as engine:
        await world.publish(job, 2)
        await published(live, job)
        assert await loaded(engine) == [f"{job.id}-a1-s1", f"{job.id}-a1-s2"]
        async with live.engines.using(first):  # a request that was a little late
            assert await loaded(engine) == [f"{job.id}-a1-s1", f"{job.id}-a1-s2"]
    await until_async(lambda: serves(engine, f"{job.id}-a1-s2"))
    await world.jobs.transition(job, "cancelled")
    await live.tick()
    await until_async(lambda: serves(engine))
    assert live.loaded() == set()


@pytest.mark.parametrize("full", [pytest.param(False, id="row-133-adapter"), pytest.param(True, id="row-133-full")])
async def test_weights_that_cannot_be_loaded_are_not_replaced_by_old_ones(
    world: World, live: WeightSync, full: bool
) -> None:
    job = await world.job(lora=None if full else {})
    await world.publish(job, 1, full=full)
    engine = await engine_of(live, world, job)
    await world.publish(job, 2, full=full, raw=b"cut")
    await published(live, job)
    if full:  # an engine whose weights may be mixed is gone; the mock starts with any weights, so that it is back
        assert engine.process.returncode is not None
        fresh = await engine_of(live, world, job)
        assert fresh is not engine
        assert await version_of(fresh, job.id) == 2
    else:
        messages = [event.message for event in world.jobs.events(job.id, 5)]
        assert any("Policy version 2 cannot be served" in message for message in messages), messages
        with pytest.raises(ApiError, match="cannot be loaded") as refused:
            await engine_of(live, world, job)
        assert refused.value.status == 503
    await world.publish(job, 3, full=full)
    await published(live, job)
    later = await engine_of(live, world, job)
    assert full or later is engine, "the engine of an adapter goes on: others use it"


async def test_row_132_all_weights_are_updated_while_the_engine_runs(world: World, live: WeightSync) -> None:
    job = await world.job(lora=None)
    engine = await engine_of(live, world, job)
    assert await version_of(engine, job.id) == 0
    for version in (1, 2):
        await world.publish(job, version, full=True)
        await published(live, job)
        assert await version_of(engine, job.id) == version
    await world.publish(job, 3, full=True)
    found = await asyncio.gather(*(engine_of(live, world, job) for _ in range(5)))
    assert set(found) == {engine}
    assert await version_of(engine, job.id) == 3, "requests wait for the version they were promised"
    assert live.loaded() == {job.id}
    await live.tick()
    assert engine.process.returncode is None
    await world.jobs.transition(job, "cancelled")
    await live.tick()
    assert engine.process.returncode is not None


async def test_row_112_a_clock_that_is_set_back_leaves_no_files_of_a_job_that_has_ended(
    world: World, live: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [await world.job(lora={}) for _ in range(2)]
    for job, back in zip(jobs, (0, 3600), strict=True):
        await world.publish(job, 1)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda back=back, real=time.time: real() - back)
            ended = await world.jobs.transition(job, "cancelled")
        assert ended is not None
        assert ended.finished_at >= job.created_at
        await live.tick()
        await live.tick()
        assert not (world.root / "jobs" / job.id / "weights").exists()


async def test_an_engine_that_starts_late_starts_with_the_newest_weights(world: World, live: WeightSync) -> None:
    job = await world.job(lora=None)
    await world.publish(job, 7, full=True)
    assert await version_of(await engine_of(live, world, job), job.id) == 7


async def test_row_132_requests_that_wait_for_an_update_that_fails_hear_that_a_retry_helps(
    world: World, live: WeightSync
) -> None:
    job = await world.job(lora=None)
    engine = await engine_of(live, world, job)
    await world.publish(job, 1, full=True, raw=b"cut")
    with pytest.raises(ApiError, match="did not take new weights") as refused:
        await engine_of(live, world, job)
    assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "1")
    assert engine.process.returncode is not None
    assert await engine_of(live, world, job) is not engine


async def test_versions_that_their_trainer_removed_meanwhile_are_passed_over(
    world: World, live: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await world.job(lora=None)
    engine = await engine_of(live, world, job)
    update, begun, may_end, versions = engine.update, asyncio.Event(), asyncio.Event(), []

    async def slow(path: str, version: int) -> None:
        versions.append(version)
        begun.set()
        await may_end.wait()
        await update(path, version)

    monkeypatch.setattr(engine, "update", slow)
    waiting = []
    for version in (1, 2, 3):
        folder = Path(await world.publish(job, version, full=True))
        waiting.append(asyncio.create_task(engine_of(live, world, job)))
        await begun.wait()
        while live.engines.models[Key(job.id, "/base")].full != FullPolicy(str(folder), version):
            await asyncio.sleep(0)
    shutil.rmtree(folder.parent / "2-1")
    may_end.set()
    assert await asyncio.gather(*waiting) == [engine] * 3
    assert versions == [1, 3]
    assert await version_of(engine, job.id) == 3


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
async def test_a_policy_that_is_published_faster_than_it_is_loaded_is_always_served(
    world: World, make: Any, full: bool
) -> None:
    """Clients that get a 503 here would lose their rollouts: whatever the pace, each gets the version that it was
    promised or a newer one, and never an older one than before."""
    engines = make(newest=world.models.jobs.last, weights_seconds=0.2, load_seconds=0.3)
    live = WeightSync(world.models.jobs, engines, world.jobs)
    job = await world.job(lora=None if full else {})

    async def publish() -> None:
        folder = JobDir.of(world.root, job.id).weights
        for version in itertools.count(1):
            with publishing(folder, f"{version}-1") as new:
                weights(new, full, TENSORS)
            event = PolicyPublished(version=version, handled=version, dir=f"{version}-1")
            await world.store.write(functools.partial(record_policy, job_id=job.id, event=event))
            live.published(job.id)
            await asyncio.sleep(0.02)

    async def ask() -> None:
        last = 0
        while last <= KEPT:  # until those that were there at first are gone
            promised = world.models.resolve(job.id, "me")
            async with engines.serving(promised) as (engine, found):
                assert isinstance(engine, EngineProcess)
                assert full or found.name in await loaded(engine)
                version = await version_of(engine, job.id) if full else found.version
            assert version >= promised.version >= last
            last = version

    publisher = asyncio.create_task(publish())
    await until_async(lambda: world.models.resolve(job.id, "me").version > 0)
    await asyncio.gather(*(ask() for _ in range(4)))
    publisher.cancel()
    await asyncio.gather(publisher, *engines.background, return_exceptions=True)
    assert engines.starter.count == 1
    assert not [event.message for event in world.jobs.events(job.id, 5) if event.level == "error"]


async def test_a_version_that_is_read_stays_until_it_was_read(tmp_path: Path) -> None:
    def publish(version: int) -> Path:
        with publishing(tmp_path, f"{version}-1"):
            return tmp_path / f"{version}-1"

    first = publish(1)
    with reading(first) as there, reading(first) as again:
        assert (there, again) == (True, True)
        for version in range(2, 9):
            publish(version)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1-1", "5-1", "6-1", "7-1", "8-1"]
    publish(9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6-1", "7-1", "8-1", "9-1"]
    with reading(first) as there:
        assert not there


async def test_a_start_with_weights_that_are_gone_is_tried_again_with_newer_ones(
    world: World, live: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await world.job(lora=None)
    folder = Path(await world.publish(job, 1, full=True))
    begin = live.engines.backends.default.backend.start

    async def superseded(spec: EngineSpec) -> Any:
        """The trainer publishes while the engine starts."""
        shutil.rmtree(folder)
        raise ArborError(f"cannot load a model from {spec.path}")

    monkeypatch.setattr(live.engines.backends.default.backend, "start", superseded)
    with pytest.raises(ApiError, match="loaded anew") as refused:
        await engine_of(live, world, job)
    assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "1")
    monkeypatch.setattr(live.engines.backends.default.backend, "start", begin)
    await world.publish(job, 2, full=True)
    assert await version_of(await engine_of(live, world, job), job.id) == 2


async def test_nothing_is_said_of_a_policy_that_has_gone_for_a_newer_one(
    world: World, live: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await world.job()

    async def refresh(_: Resolved) -> None:
        await world.publish(job, 2)
        raise ApiError(503, "gone", "engine_unavailable")

    await world.publish(job, 1)
    monkeypatch.setattr(live, "refresh", refresh)
    await published(live, job)
    assert not [event.message for event in world.jobs.events(job.id, 5) if event.level == "error"]
