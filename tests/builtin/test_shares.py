"""Shares of devices: however leases come and go, those of one device never come to more than 1, and nothing is lost."""

from __future__ import annotations

import asyncio
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from arbor_core import ArborError, Bundle, Claim, Device, Lease, PoolAllocator

SHARES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
DEVICES = 3
bundles = some.builds(
    Bundle, role=some.sampled_from(["engine:a", "engine:b"]), count=some.integers(1, 2), share=some.sampled_from(SHARES)
)
claims = some.builds(Claim, owner=some.just("x"), bundles=some.tuples(bundles))
steps = some.lists(some.one_of(claims, some.integers(0, 9)), max_size=25)


def allocator(devices: int = DEVICES) -> PoolAllocator:
    return PoolAllocator({"train": [], "engine": [Device(f"e{n}") for n in range(devices)]})


def exact(share: float) -> Fraction:
    return Fraction(share).limit_denominator(100)


@given(steps)
@settings(max_examples=60, deadline=None)
def test_shares_of_a_device_never_come_to_more_than_1_and_come_back(steps: list[Claim | int]) -> None:
    """A step is a claim, or the number of what ends: a lease that is released, or a claim that is given up."""

    async def play() -> None:
        pool, waiting = allocator(), list[asyncio.Task[Lease]]()
        for step in steps:
            if isinstance(step, Claim):
                waiting.append(asyncio.create_task(pool.acquire(step)))
            elif step < len(waiting):
                await end(pool, waiting.pop(step))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            check([task.result() for task in waiting if task.done()], pool)
        for task in waiting:
            await end(pool, task)
        assert pool.free() == {"train": 0, "engine": DEVICES}
        assert not pool.leases
        assert not pool.held["engine"]

    asyncio.run(play())


async def end(pool: PoolAllocator, task: asyncio.Task[Lease]) -> None:
    if task.done():
        pool.release(task.result())
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def check(leases: list[Lease], pool: PoolAllocator) -> None:
    used = {device.id: Fraction(0) for device in pool.inventory()["engine"]}
    for lease in leases:
        (bundle,), (devices,) = lease.claim.bundles, lease.devices
        assert len({device.id for device in devices}) == bundle.count
        for device in devices:
            used[device.id] += exact(bundle.share)
    assert max(used.values()) <= 1
    assert pool.free()["engine"] == sum(share == 0 for share in used.values())


async def test_two_engines_of_0_4_share_a_device_and_a_third_waits() -> None:
    pool = allocator(1)
    claim = Claim("engine:a", (Bundle("engine", 1, 0.4),))
    first, second = await pool.acquire(claim), await pool.acquire(claim)
    third = asyncio.create_task(pool.acquire(claim))
    await asyncio.sleep(0)
    assert not third.done()
    assert pool.free()["engine"] == 0
    pool.release(first)
    assert (await asyncio.wait_for(third, 60)).of("engine") == second.of("engine")


async def test_ten_tenths_fill_a_device_although_they_are_floating_point_numbers() -> None:
    pool = allocator(1)
    for _ in range(10):
        await asyncio.wait_for(pool.acquire(Claim("x", (Bundle("engine", 1, 0.1),))), 60)
    assert math.fsum(pool.held["engine"]["e0"].values()) == pytest.approx(1)


@pytest.mark.parametrize("bundle", [Bundle("engine", 1, 0.0), Bundle("engine", 1, 1.5), Bundle("engine", 0)])
async def test_a_claim_of_nothing_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ArborError, match="expected a share above 0"):
        await allocator().acquire(Claim("x", (bundle,)))
