"""`check_scheduler` and `check_allocator`: who runs next, and on what."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from arbor_core.types import (
    Allocator,
    ArborError,
    Bundle,
    Claim,
    DevicesLostError,
    Lease,
    QueuedJob,
    RunningJob,
    Scheduler,
    Snapshot,
    free_by_node,
    most_on_one_node,
    placements,
)

ROUNDS = 300
MOST_JOBS, MOST_DEVICES = 8, 8
WAIT_SECONDS = 60.0


def check_scheduler(factory: Callable[[], Scheduler], *, rounds: int = ROUNDS) -> None:
    """Check a scheduler on random snapshots.

    Its plan must be a function of the snapshot, start only jobs that wait, each once and all of them on free devices,
    those of each on one node, pause only jobs that run, and start a job that waits alone before an idle machine.

    Args:
        factory: As the plugin's hook returns it.
        rounds: How many snapshots; the same ones each time.

    Raises:
        AssertionError: what was expected, with the snapshot.
    """
    for number in range(rounds):
        snapshot = random_snapshot(random.Random(number))
        before = msgspec.json.encode(snapshot)
        scheduler = factory()
        plan = scheduler.plan(snapshot)
        assert msgspec.json.encode(snapshot) == before, f"plan() changed its snapshot: {snapshot}"
        assert scheduler.plan(snapshot) == plan, f"the same snapshot gave another plan: {snapshot}"
        assert factory().plan(snapshot) == plan, f"a new scheduler plans otherwise from the same snapshot: {snapshot}"
        queued = {job.id: job for job in snapshot.queued}
        running = {job.id for job in snapshot.running}
        assert set(plan.start) <= set(queued), f"starts jobs that do not wait: {plan} of {snapshot}"
        assert len(set(plan.start)) == len(plan.start), f"starts a job twice: {plan}"
        assert set(plan.preempt) <= running, f"pauses jobs that do not run: {plan} of {snapshot}"
        free = snapshot.places()
        for name in plan.start:  # they are granted in this order
            needed = next(placements(queued[name].claim, free), None)
            assert needed is not None, (
                f"starts {name}, for which no node has enough of the {dict(free)} that are free by pool and node then"
                f" (see Snapshot.free_by_node): {plan} of {snapshot}"
            )
            free.subtract(needed)
    alone = QueuedJob("only", Claim("only", (Bundle("train", 2),)), 1)
    plan = factory().plan(Snapshot((alone,), (), {"train": 2, "engine": 0}))
    assert plan.start == ("only",), f"a job that fits an idle machine is not started: {plan}"
    plan = factory().plan(Snapshot((alone,), (), {"train": 4}, {"train": {"a": 1, "b": 3}}))
    assert plan.start == ("only",), f"a job that fits an idle node is not started: {plan}"


def random_snapshot(draw: random.Random) -> Snapshot:
    """Some nodes at some moment."""

    def claim(owner: str) -> Claim:
        return Claim(owner, (Bundle("train", draw.randint(1, MOST_DEVICES)),))

    nodes = draw.choice((("",), ("", "b"), ("a", "b", "c")))
    order = list(range(2 * MOST_JOBS))
    draw.shuffle(order)
    queued = tuple(
        QueuedJob(f"q{n}", claim(f"q{n}"), order[n], draw.choice((0, 0, 1, -1)))
        for n in range(draw.randint(0, MOST_JOBS))
    )
    running = tuple(
        RunningJob(
            f"r{n}",
            claim(f"r{n}"),
            order[MOST_JOBS + n],
            draw.choice((0, 1)),
            stopping=draw.random() < 0.2,
            nodes=(draw.choice(nodes),),
        )
        for n in range(draw.randint(0, MOST_JOBS))
    )
    by_node = {
        "train": {node: draw.randint(0, MOST_DEVICES) for node in nodes},
        "engine": {"": draw.randint(0, 2)},
    }
    return Snapshot(queued, running, {pool: sum(free.values()) for pool, free in by_node.items()}, by_node)


def check_allocator(factory: Callable[[], Allocator], *, pool: str = "train") -> None:
    """Check an allocator: leases are whole, exclusive, waited for, and given back; the devices of a bundle are on one
    node.

    Args:
        factory: Makes a new allocator of the same devices each time, at least one in `pool`.
        pool: The pool to try.

    Raises:
        AssertionError: what was expected.
    """
    asyncio.run(_check_allocator(factory, pool))


async def _check_allocator(factory: Callable[[], Allocator], pool: str) -> None:
    allocator = factory()
    devices = allocator.inventory()[pool]
    size = len(devices)
    assert size >= 1, f"there is no device in the pool '{pool}' to try"
    assert allocator.free()[pool] == size, f"a new allocator has {allocator.free()[pool]} of {size} devices free"
    _check_free(allocator, pool)
    await _check_too_much(allocator, pool, most_on_one_node(devices))
    whole = _claim(pool, "all", *Counter(device.node for device in devices).values())
    leases = [await _soon(allocator.acquire(_claim(pool, f"job-{n}", 1))) for n in range(size)]
    held = [device.id for lease in leases for device in lease.of(pool)]
    assert len(held) == len(set(held)) == size, f"{size} leases of one device each hold {held}"
    assert allocator.free()[pool] == 0, f"all devices are leased, {allocator.free()[pool]} are said to be free"
    _check_free(allocator, pool, held)
    await _check_waiting(allocator, pool, leases)
    assert allocator.free()[pool] == size, f"all is given back, {allocator.free()[pool]} of {size} are free"
    await _check_restored(factory, pool, whole)
    await _check_lost(factory, pool, whole)
    await _check_shares(factory, pool, size)


def _check_free(allocator: Allocator, pool: str, held: Sequence[str] = ()) -> None:
    """What is free on each node is what nobody holds there."""
    nodes = Counter(device.node for device in allocator.inventory()[pool] if device.id not in held)
    said = +Counter(free_by_node(allocator)[pool])
    assert said == nodes, f"these are said to be free on each node: {dict(said)}, and these are: {dict(nodes)}"


async def _check_too_much(allocator: Allocator, pool: str, most: int) -> None:
    """The devices of a bundle are on one node: more than it has are never leased."""
    said, free = None, allocator.free()[pool]
    try:
        await _soon(allocator.acquire(_claim(pool, "too-much", most + 1)))
    except ArborError as error:
        said = str(error)
    assert said is not None, f"{most + 1} devices were leased at once, and no node has more than {most}"
    assert said, "a claim that can never fit is refused without a reason"
    assert allocator.free()[pool] == free, "a claim that was refused holds devices"


async def _check_waiting(allocator: Allocator, pool: str, leases: Sequence[Lease]) -> None:
    """With everything leased: who waits gets what is given back, unless it gave up."""
    gave_up = asyncio.create_task(allocator.acquire(_claim(pool, "impatient", 1)))
    waits = asyncio.create_task(allocator.acquire(_claim(pool, "patient", 1)))
    await asyncio.sleep(0)
    assert not gave_up.done(), "a claim was granted although nothing is free"
    gave_up.cancel()
    await asyncio.gather(gave_up, return_exceptions=True)
    allocator.release(leases[0])
    lease = await _soon(waits)
    assert lease.of(pool), "a lease that was waited for holds no device"
    for held in (*leases[1:], lease, lease):  # twice: harmless
        allocator.release(held)


async def _check_restored(factory: Callable[[], Allocator], pool: str, whole: Claim) -> None:
    """A lease of before the server's restart holds its devices in the next server."""
    lease = await _soon(factory().acquire(whole))
    for bundle, devices in zip(whole.bundles, lease.devices, strict=True):
        assert len(devices) == bundle.count, f"a bundle of {bundle.count} devices got {len(devices)}"
        assert len({device.node for device in devices}) == 1, (
            f"the devices of one bundle are on several nodes: {devices}"
        )
    allocator, size = factory(), sum(bundle.count for bundle in whole.bundles)
    allocator.restore(lease)
    assert allocator.free()[pool] == 0, "a restored lease does not hold its devices"
    allocator.release(lease)
    assert allocator.free()[pool] == size, "a restored lease cannot be released"


async def _check_lost(factory: Callable[[], Allocator], pool: str, whole: Claim) -> None:
    """A device that is lost while somebody holds it: nobody gets it any more, and nobody waits for it."""
    allocator = factory()
    lease = await _soon(allocator.acquire(whole))
    waits = asyncio.create_task(allocator.acquire(msgspec.structs.replace(whole, owner="waits")))
    await asyncio.sleep(0)
    gone = lease.of(pool)[0].id
    allocator.set_aside([gone])
    assert [device.id for device in allocator.lost()[pool]] == [gone], "a device that was set aside is not lost"
    assert gone not in {device.id for device in allocator.inventory()[pool]}, "a lost device is in the inventory"
    outcome = (await asyncio.gather(_soon(waits), return_exceptions=True))[0]
    assert isinstance(outcome, DevicesLostError), "a claim that waits for a lost device is not refused"
    allocator.release(lease)
    left = sum(bundle.count for bundle in whole.bundles) - 1
    assert allocator.free()[pool] == left, "a lost device that is given back is free"


async def _check_shares(factory: Callable[[], Allocator], pool: str, size: int) -> None:
    """Leases of parts of a device share it as far as they fit; whoever needs all of it waits for both."""
    allocator = factory()
    part = Claim("part", (Bundle(pool, 1, 0.4),))
    leases = [await _soon(allocator.acquire(part)) for _ in range(2)]
    assert leases[0].of(pool) == leases[1].of(pool), "two leases of 0.4 do not share a device"
    assert allocator.free()[pool] == size - 1, "a device of which a share is leased is said to be free"
    others = [await _soon(allocator.acquire(_claim(pool, f"whole-{n}", 1))) for n in range(size - 1)]
    assert leases[0].of(pool)[0] not in [device for lease in others for device in lease.of(pool)], "it was leased twice"
    third = asyncio.create_task(allocator.acquire(part))
    await asyncio.sleep(0)
    assert not third.done(), "three leases of 0.4 share a device"
    allocator.release(leases[0])
    leases.append(await _soon(third))
    for lease in (*leases, *others):
        allocator.release(lease)
    assert allocator.free()[pool] == size, "shares that were given back are not free"


def _claim(pool: str, owner: str, *counts: int) -> Claim:
    """A claim of a bundle for each count."""
    return Claim(owner, tuple(Bundle(pool, count) for count in counts))


async def _soon(lease: object) -> Lease:
    """The lease, which must not take long."""
    async with asyncio.timeout(WAIT_SECONDS):
        return await lease  # type: ignore[misc, no-any-return]
