"""The scheduler `fifo` and the allocator `local`, with properties over random job streams."""

import asyncio
import sqlite3
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbor_core import AllocatorSettings, ArborError, Bundle, Claim, Device, QueuedJob, Snapshot
from arbor_core.builtin.allocator import LocalAllocator, PoolAllocator
from arbor_core.builtin.schedulers import FifoScheduler
from arbor_core.dispatch.dispatcher import Dispatcher
from arbor_core.testing import check_allocator
from arbor_core.types import DevicesLostError, free_by_node

SIZES = st.lists(st.integers(1, 4), max_size=12)


def claim(owner: str, count: int, engines: int = 0) -> Claim:
    bundles = [Bundle("train", count)] + ([Bundle("engine:base", engines)] if engines else [])
    return Claim(owner, tuple(bundles))


def pools(train: int, engine: int = 0) -> PoolAllocator:
    return PoolAllocator(
        {
            "train": [Device(f"t{i}", "mock", i) for i in range(train)],
            "engine": [Device(f"e{i}", "mock", i) for i in range(engine)],
        }
    )


def snapshot(sizes: list[int], free: int) -> Snapshot:
    queued = tuple(QueuedJob(f"j{n}", claim(f"j{n}", size), n) for n, size in enumerate(sizes))
    return Snapshot(queued, (), {"train": free})


@given(SIZES, st.integers(0, 8))
def test_fifo_starts_the_longest_prefix_that_fits(sizes, free):
    plan = FifoScheduler().plan(snapshot(sizes, free))
    count = len(plan.start)
    assert plan.start == tuple(f"j{n}" for n in range(count))
    assert sum(sizes[:count]) <= free
    assert count == len(sizes) or sum(sizes[: count + 1]) > free  # no device idles while the next job fits
    assert plan == FifoScheduler().plan(snapshot(sizes, free))


@given(SIZES)
@settings(max_examples=50)
def test_every_job_runs_and_no_device_is_leased_twice(sizes):
    async def simulate() -> None:
        allocator, scheduler = pools(4), FifoScheduler()
        queued = {f"j{n}": claim(f"j{n}", size) for n, size in enumerate(sizes)}
        running, finished = {}, []
        while queued or running:
            jobs = tuple(QueuedJob(name, wanted, int(name[1:])) for name, wanted in queued.items())
            for name in scheduler.plan(Snapshot(jobs, (), dict(allocator.free()))).start:
                running[name] = await allocator.acquire(queued.pop(name))
            held = [device.id for lease in running.values() for device in lease.of("train")]
            assert len(held) == len(set(held)) <= 4
            assert running, "queued jobs, free devices, and nobody runs"
            name, lease = next(iter(running.items()))
            del running[name]
            allocator.release(lease)
            finished.append(name)
        assert sorted(finished) == sorted(f"j{n}" for n in range(len(sizes)))
        assert allocator.free()["train"] == 4

    asyncio.run(simulate())


async def test_a_claim_waits_for_all_its_bundles_and_holds_none_meanwhile():
    allocator = pools(2, 1)
    first = await allocator.acquire(claim("a", 1, engines=1))
    waiting = asyncio.create_task(allocator.acquire(claim("b", 1, engines=1)))
    await asyncio.sleep(0)
    assert allocator.free() == {"train": 1, "engine": 0}
    allocator.release(first)
    lease = await asyncio.wait_for(waiting, 60)
    assert [device.id for device in lease.of("engine:base")] == ["e0"]
    allocator.release(lease)
    allocator.release(lease)
    assert allocator.free() == {"train": 2, "engine": 1}


async def test_a_cancelled_claim_leaves_nothing_held():
    allocator = pools(1)
    first = await allocator.acquire(claim("a", 1))
    waiting = asyncio.create_task(allocator.acquire(claim("b", 1)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    late = asyncio.create_task(allocator.acquire(claim("c", 1)))
    await asyncio.sleep(0)
    allocator.release(first)
    assert allocator.free()["train"] == 0  # granted to the one that waits, who has not heard of it
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert allocator.free()["train"] == 1


async def test_a_claim_that_can_never_fit_says_so():
    with pytest.raises(ArborError, match=r"needs 3 device\(s\) to train, this server has 2"):
        await pools(2).acquire(claim("a", 3))


def nodes(**counts: int) -> PoolAllocator:
    return PoolAllocator(
        {"train": [Device(f"{node}/{i}", "mock", i, node=node) for node, n in counts.items() for i in range(n)]}
    )


async def test_the_devices_of_a_bundle_are_on_one_node():
    allocator = nodes(a=2, b=3)
    small = await allocator.acquire(claim("small", 1))
    assert {device.node for device in small.of("train")} == {"a"}  # the large node is left for large claims
    large = await allocator.acquire(claim("large", 3))
    assert {device.node for device in large.of("train")} == {"b"}
    waiting = asyncio.create_task(allocator.acquire(claim("waits", 2)))
    await asyncio.sleep(0)
    allocator.release(large)
    assert {device.node for device in (await asyncio.wait_for(waiting, 60)).of("train")} == {"b"}


async def test_bundles_are_spread_over_nodes_in_whatever_way_they_fit():
    wanted = Claim("a", tuple(Bundle("train", count) for count in (4, 3, 3, 2)))
    lease = await nodes(a=7, b=5).acquire(wanted)  # 4 and 3, 3 and 2
    assert [len(devices) for devices in lease.devices] == [4, 3, 3, 2]
    assert all(len({device.node for device in devices}) == 1 for devices in lease.devices)
    assert len({device.id for devices in lease.devices for device in devices}) == 12


async def test_a_bundle_that_no_node_can_hold_is_refused_with_what_the_nodes_have():
    with pytest.raises(ArborError, match=r"needs 4 device\(s\) to train, this server has 2 on a and 3 on b"):
        await nodes(a=2, b=3).acquire(claim("a", 4))
    allocator = nodes(a=2, b=3)
    allocator.set_aside(["b/0"])
    with pytest.raises(DevicesLostError, match="b/0 is lost"):
        await allocator.acquire(claim("a", 3))


async def test_a_lease_from_before_a_restart_is_held_again():
    before, after = pools(2), pools(2)
    lease = await before.acquire(claim("a", 1))
    after.restore(lease)
    assert after.free()["train"] == 1


def test_devices_of_several_nodes_conform():
    check_allocator(lambda: nodes(a=2, b=3))


class OlderAllocator:
    """As plugins wrote them before allocators said what is free on each node."""

    def __init__(self, *on: str) -> None:
        self.devices = [Device(f"d{n}", "mock", n, node=node) for n, node in enumerate(on)]

    def inventory(self) -> dict[str, list[Device]]:
        return {"train": self.devices}

    def free(self) -> dict[str, int]:
        return {"train": len(self.devices), "engine": 0}


def test_an_allocator_of_one_node_need_not_say_what_is_free_on_each():
    assert free_by_node(OlderAllocator("a", "a")) == {"train": {"a": 2}, "engine": {"": 0}}
    with pytest.raises(ArborError, match=r"OlderAllocator has devices of 'train' on 'a', 'b'.* free_by_node\(\)"):
        free_by_node(OlderAllocator("a", "b"))


def test_a_snapshot_that_names_no_nodes_is_of_this_machine():
    assert Snapshot((), (), {"train": 3}).free_by_node == {"train": {"": 3}}


async def test_the_dispatcher_says_on_which_node_a_job_runs_and_what_is_free_on_each(tmp_path):
    allocator, spec = nodes(a=2, b=3), SimpleNamespace(trainer="t", devices=3)
    job = SimpleNamespace(desired="run", id="j", status="queued", attempt=0, spec=spec)

    async def transition(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(seq=1, priority=0, waited=0)

    jobs = SimpleNamespace(get=lambda _: job, transition=transition, store=None)
    dispatcher = Dispatcher(jobs, None, None, None, {"t": None}, FifoScheduler(), allocator, tmp_path, 60)
    dispatcher._spawn = lambda _, work: work.close()
    dispatcher.queue.stopping = set
    await dispatcher._start("j")
    seen = dispatcher._snapshot([])
    assert (seen.free, seen.free_by_node) == ({"train": 2}, {"train": {"a": 2, "b": 0}})
    assert [job.held() for job in seen.running] == [{("train", "b"): 3}]


async def test_a_start_that_cannot_be_written_down_leaves_no_device_held(tmp_path):
    allocator, spec = pools(1), SimpleNamespace(trainer="t", devices=1)
    job = SimpleNamespace(desired="run", id="j", status="queued", attempt=0, spec=spec)

    async def full(*_: object, **__: object) -> bool:
        raise sqlite3.OperationalError("database or disk is full")

    jobs = SimpleNamespace(get=lambda _: job, transition=full, store=None)
    dispatcher = Dispatcher(jobs, None, None, None, {"t": None}, FifoScheduler(), allocator, tmp_path, 60)
    with pytest.raises(sqlite3.OperationalError):
        await dispatcher._start("j")
    assert allocator.free()["train"] == 1 and not dispatcher.leases


def test_without_gpus_ids_are_cpu_slots(monkeypatch):
    monkeypatch.setattr("arbor_core.builtin.allocator.find_gpus", list)
    slots = LocalAllocator.from_settings(AllocatorSettings([0, 1], None)).inventory()
    assert [device.id for device in slots["train"]] == ["cpu:0", "cpu:1"]
    assert len(slots["engine"]) == 4
    assert len(LocalAllocator.from_settings(AllocatorSettings(None, [5])).inventory()["train"]) == 1


@pytest.mark.parametrize(("count", "train", "serve"), [(1, ["GPU-0"], ["GPU-0"]), (3, ["GPU-0", "GPU-1"], ["GPU-2"])])
def test_row_106_with_gpus_the_last_one_serves(monkeypatch, count, train, serve):
    gpus = [Device(f"GPU-{n}", "cuda", n, 80 << 30) for n in range(count)]
    monkeypatch.setattr("arbor_core.builtin.allocator.find_gpus", lambda: gpus)
    found = LocalAllocator.from_settings(AllocatorSettings(None, None)).inventory()
    assert [device.id for device in found["train"]] == train
    assert [device.id for device in found["engine"]] == serve


def test_row_70_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("arbor_core.builtin.allocator.find_gpus", lambda: [Device("GPU-a", "cuda", 0)])
    with pytest.raises(ArborError, match=r"gpu.train: GPU 7 not found \(have 0\)"):
        LocalAllocator.from_settings(AllocatorSettings([7], None))
