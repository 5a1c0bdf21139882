"""The scheduler `priority`: its plans, what holds over random streams of jobs, and what a real server makes of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import product

import pytest
from http_calls import submit, supervised
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import create, go_on, hanging, held, lease_ends, messages, step_events, stopped
from msgspec import structs
from waiting import until

from arbor_core import Bundle, Claim, Device, Lease, QueuedJob, RunningJob, Snapshot, placements
from arbor_core.builtin.allocator import PoolAllocator
from arbor_core.builtin.schedulers import STARTS_PER_POINT, FifoScheduler, PriorityScheduler, urgency
from arbor_core.types import free_by_node

TRAIN, ENGINE = 4, 2
NODES = [(TRAIN,), (3, 1), (2, 2), (2, 1, 1)]
"""Ways to spread the devices to train on over machines."""


def claim(owner: str, train: int, engines: int = 0) -> Claim:
    bundles = [Bundle("train", train)] + ([Bundle("engine:base", engines)] if engines else [])
    return Claim(owner, tuple(bundles))


def queued(name: str, seq: int, devices: int = 1, priority: int = 0, waited: int = 0) -> QueuedJob:
    return QueuedJob(name, claim(name, devices), seq, priority, waited)


def running(name: str, seq: int, devices: int = 1, priority: int = 0, waited: int = 0, stopping=False) -> RunningJob:
    return RunningJob(name, claim(name, devices), seq, priority, waited, stopping)


def plan(line, working=(), free=0):
    found = PriorityScheduler().plan(Snapshot(tuple(line), tuple(working), {"train": free}))
    return list(found.start), list(found.preempt)


def test_higher_goes_first_and_equals_in_order_of_arrival():
    line = [queued("a", 1), queued("b", 2, priority=5), queued("c", 3, priority=5), queued("d", 4, priority=-1)]
    assert plan(line, free=3) == (["b", "c", "a"], [])


def test_the_lowest_is_paused_the_fewest_of_them_and_the_youngest():
    assert plan([queued("x", 9, priority=5)], [running("a", 1, priority=1), running("b", 2)]) == ([], ["b"])
    assert plan([queued("x", 9, priority=5)], [running("a", 1), running("b", 2)]) == ([], ["b"])
    small = [running("a", 1), running("b", 2), running("big", 3, devices=2)]
    assert plan([queued("x", 9, devices=2, priority=5)], small) == ([], ["big"])
    dear = [running("a", 1), running("b", 2), running("big", 3, devices=2, priority=4)]
    assert plan([queued("x", 9, devices=2, priority=5)], dear) == ([], ["b", "a"])


def test_nobody_is_paused_in_vain():
    assert plan([queued("x", 9, devices=3, priority=5)], [running("a", 1), running("b", 2, devices=2, priority=5)]) == (
        [],
        [],
    )
    assert plan([queued("x", 9)], [running("a", 1)]) == ([], [])
    assert plan([queued("x", 9, priority=5)], [running("a", 1, stopping=True), running("b", 2)]) == ([], [])
    two = [queued("x", 9, priority=5), queued("y", 10, priority=5)]
    assert plan(two, [running("a", 1, stopping=True), running("b", 2), running("c", 3)]) == ([], ["c"])


def test_a_job_that_does_not_fit_holds_back_those_behind_it():
    assert plan([queued("big", 1, devices=3), queued("small", 2)], [running("a", 0)], free=2) == ([], [])


def test_age_goes_before_priority_and_pauses_nobody():
    old = queued("old", 1, waited=6 * STARTS_PER_POINT)
    assert plan([old, queued("new", 2, priority=5)], free=1) == (["old"], [])
    assert plan([old], [running("a", 0, priority=2)]) == ([], [])
    aged = running("aged", 1, waited=6 * STARTS_PER_POINT)
    assert plan([queued("new", 2, priority=5)], [aged]) == ([], [])


def on(node: str, job: RunningJob) -> RunningJob:
    return structs.replace(job, nodes=(node,))


def plan_on(nodes: dict[str, int], line, working=()):
    found = PriorityScheduler().plan(Snapshot(tuple(line), tuple(working), {}, {"train": nodes}))
    return list(found.start), list(found.preempt)


@pytest.mark.parametrize("scheduler", [FifoScheduler, PriorityScheduler])
def test_devices_of_two_nodes_do_not_add_up(scheduler):
    line = (queued("large", 1, devices=2), queued("small", 2))
    assert scheduler().plan(Snapshot(line, (), {"train": 2}, {"train": {"a": 1, "b": 1}})).start == ()
    assert scheduler().plan(Snapshot(line, (), {"train": 3}, {"train": {"a": 2, "b": 1}})).start == ("large", "small")


def test_small_jobs_leave_the_large_node_to_large_ones():
    line = [queued("small", 1), queued("large", 2, devices=2)]
    assert plan_on({"a": 2, "b": 1}, line) == (["small", "large"], [])


def test_jobs_are_preempted_on_one_node_where_that_is_enough():
    line = [queued("x", 9, devices=2, priority=5)]
    spread = [on("a", running("a1", 1)), on("b", running("b1", 2))]
    assert plan_on({"a": 0, "b": 0}, line, spread) == ([], [])  # each would free one on another node
    assert plan_on({"a": 1, "b": 0}, line, spread) == ([], ["a1"])
    soon = on("b", running("b2", 3, stopping=True))
    assert plan_on({"a": 0, "b": 0}, line, [*spread, soon]) == ([], ["b1"])
    assert plan_on({"a": 0, "b": 1}, line, [*spread, soon]) == ([], [])  # it gets them anyway
    dear = [on("a", running("a1", 1, devices=2, priority=4)), on("b", running("b1", 2)), on("b", running("b2", 3))]
    assert plan_on({"a": 0, "b": 0}, line, dear) == ([], ["b2", "b1"])
    few = [on("a", running("a1", 1, devices=2)), *dear[1:]]
    assert plan_on({"a": 0, "b": 0}, line, few) == ([], ["a1"])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.lists(st.integers(1, 3), max_size=4))
def test_every_way_to_place_a_claim_is_found(free, counts):
    places = {("train", str(node)): count for node, count in enumerate(free)}
    wanted = Claim("x", tuple(Bundle("train", count) for count in counts))
    ways = list(placements(wanted, places))
    assert all(way.total() == sum(counts) and way <= Counter(places) for way in ways)
    fitting = [
        nodes
        for nodes in product(range(len(free)), repeat=len(counts))
        if all(
            sum(count for count, on in zip(counts, nodes, strict=True) if on == node) <= free[node] for node in nodes
        )
    ]
    assert len(ways) == len(fitting)


@dataclass
class Sim:
    """A job of a simulation, in ticks."""

    name: str
    seq: int
    claim: Claim
    priority: int
    left: int
    waited: int = 0
    lease: Lease | None = None
    stopping: bool = False


@dataclass
class World:
    """Jobs and engines on simulated devices, moved on by a scheduler as the dispatcher does it."""

    scheduler: FifoScheduler | PriorityScheduler
    nodes: tuple[int, ...] = (TRAIN,)
    jobs: list[Sim] = field(default_factory=list)
    engines: list[Lease] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        train = [
            Device(f"{node}/{n}", "mock", n, node=str(node))
            for node, count in enumerate(self.nodes)
            for n in range(count)
        ]
        engine = [Device(f"engine{n}", "mock", n) for n in range(ENGINE)]
        self.allocator = PoolAllocator({"train": train, "engine": engine})

    def add(self, train: int, engines: int, priority: int, ticks: int) -> Sim:
        seq = len(self.jobs)
        train = min(train, max(self.nodes))
        self.jobs.append(Sim(f"j{seq}", seq, claim(f"j{seq}", train, engines), priority, ticks))
        return self.jobs[-1]

    def snapshot(self) -> Snapshot:
        waiting = [QueuedJob(j.name, j.claim, j.seq, j.priority, j.waited) for j in self.waiting()]
        working = [
            RunningJob(j.name, j.claim, j.seq, j.priority, j.waited, j.stopping, j.lease.nodes())
            for j in self.jobs
            if j.lease
        ]
        free, nodes = dict(self.allocator.free()), free_by_node(self.allocator)
        assert free == {pool: sum(by_node.values()) for pool, by_node in nodes.items()}
        return Snapshot(tuple(waiting), tuple(working), free, nodes)

    def waiting(self) -> list[Sim]:
        return [job for job in self.jobs if job.left and not job.lease]

    async def tick(self) -> None:
        for job in self.jobs:
            if job.lease:
                job.left -= 1
                if job.stopping or not job.left:
                    self.allocator.release(job.lease)
                    job.lease, job.stopping = None, False
        now = self.snapshot()
        found = self.scheduler.plan(now)
        mirrored = structs.replace(now, queued=now.queued[::-1], running=now.running[::-1])
        assert found == self.scheduler.plan(now) == self.scheduler.plan(mirrored)
        self.check(now, found.start, found.preempt)
        by_name = {job.name: job for job in self.jobs}
        for name in found.preempt:
            by_name[name].stopping = True
        for name in found.start:
            granted = asyncio.ensure_future(self.allocator.acquire(by_name[name].claim))
            await asyncio.sleep(0)
            assert granted.done(), f"{name} was to start, and fits on no node"
            by_name[name].lease = granted.result()
            self.starts.append(name)
            for other in self.waiting():
                other.waited += 1
        leased = [device.id for lease in self.allocator.leases.values() for held in lease.devices for device in held]
        assert len(leased) == len(set(leased)), "a device is leased twice"

    def check(self, now: Snapshot, start: tuple[str, ...], preempt: tuple[str, ...]) -> None:
        if not now.queued:
            assert not start and not preempt
            return
        key = (lambda j: j.seq) if isinstance(self.scheduler, FifoScheduler) else (lambda j: (-urgency(j), j.seq))
        line = sorted(now.queued, key=key)
        assert start == tuple(job.id for job in line[: len(start)])
        free = now.places()
        if next(placements(line[0].claim, free), None) is not None:
            assert start, "a device is idle while the next job fits"
        urgent = max(job.priority for job in line[len(start) :]) if len(start) < len(line) else None
        for job in now.running:
            if job.id in preempt:
                assert urgent is not None and job.priority < urgent and not job.stopping
        if preempt:
            for job in now.running:
                free.update(job.held() if job.stopping or job.id in preempt else ())
            for job in line[: len(start) + 1]:
                needed = next(placements(job.claim, free), None)
                assert needed is not None, "jobs are preempted, and the first that waits does not fit then"
                free.subtract(needed)


JOBS = st.lists(
    st.tuples(
        st.integers(0, 3),  # ticks after the one before
        st.integers(1, TRAIN),
        st.integers(0, 1),
        st.integers(-3, 3),
        st.integers(1, 6),
    ),
    max_size=14,
)


@pytest.mark.parametrize("scheduler", [FifoScheduler, PriorityScheduler])
@given(nodes=st.sampled_from(NODES), stream=JOBS, engine_ticks=st.lists(st.integers(0, 9), max_size=12))
@settings(max_examples=150, deadline=None)
def test_every_stream_of_jobs_comes_to_its_end(scheduler, nodes, stream, engine_ticks):
    """No double lease, no deadlock of jobs and engines, no idle device while the next job fits, no job left behind, no
    plan that fits on no node."""

    async def simulate() -> None:
        world = World(scheduler(), nodes)
        arrivals = list(stream)
        pause, engines, spent = (arrivals[0][0] if arrivals else 0), list(engine_ticks), 0
        while arrivals or any(job.left for job in world.jobs):
            while arrivals and pause == 0:
                _, train, needed, priority, ticks = arrivals.pop(0)
                world.add(train, needed, priority, ticks)
                pause = arrivals[0][0] if arrivals else 0
            pause = max(0, pause - 1)
            if engines and engines.pop() > 5 and world.allocator.free()["engine"]:  # an engine starts on demand
                world.engines.append(await world.allocator.acquire(Claim("e", (Bundle("engine:x"),))))
            elif world.engines:  # and ends when it is idle
                world.allocator.release(world.engines.pop())
            await world.tick()
            spent += 1
            assert spent < 2000, "the jobs do not come to an end"
        assert world.allocator.free()["train"] == TRAIN

    asyncio.run(simulate())


@given(st.integers(1, 6), st.integers(1, TRAIN), st.integers(1, 3), st.sampled_from(NODES))
@settings(max_examples=25, deadline=None)
def test_no_job_starves_however_many_urgent_ones_come(priority, devices, ticks, nodes):
    async def simulate() -> None:
        world = World(PriorityScheduler(), nodes)
        for _ in range(TRAIN):
            world.add(1, 0, priority, ticks)
        low = world.add(devices, 0, 0, 4)
        bound = STARTS_PER_POINT * (priority + 1) + 2 * TRAIN
        while low.left:
            while len(world.waiting()) < TRAIN + 1:
                world.add(1, 0, priority, ticks)
            await world.tick()
            before = world.starts.index(low.name) if low.name in world.starts else len(world.starts)
            assert before <= bound, "it waits for longer than the rule says"
            assert len(world.starts) < 500, "it starts, and never ends"

    asyncio.run(simulate())


def make_room(server, job_id):
    """Let a job that hangs go on when it was told to pause for a more urgent one."""
    until(lambda: (server.storage / "jobs" / job_id / "desired").read_text() == "pause")
    go_on(server, job_id)


def test_an_urgent_job_takes_the_device_and_gives_it_back(start_server, chat_rows):
    server = start_server("scheduler=priority", "gpu.train=[0]")
    low = create(server, chat_rows, hyperparameters=hanging(5, steps=60))
    until(lambda: stopped(server, low.id))
    high = create(server, chat_rows, extra_body={"priority": 10})
    assert high.model_extra["priority"] == 10
    make_room(server, low.id)
    assert server.wait(high.id).status == "succeeded"
    assert step_events(server, low.id) == [1, 2, 3, 4, 5]
    low = server.wait(low.id)
    assert low.status == "succeeded" and "priority" not in low.model_extra
    assert step_events(server, low.id) == list(range(1, 61))  # none lost, none twice
    assert any("gave its devices to a more urgent one" in text for text in messages(server, low.id))
    assert not any("paused" in text for text in messages(server, low.id))
    assert held(server) == 0
    assert lease_ends(server, low.id) == ["preempted", "succeeded"]


def test_what_the_user_asks_of_a_job_that_makes_room_is_done(start_server, chat_rows):
    server = start_server("scheduler=priority", "gpu.train=[0]")
    client = server.new_client(_strict_response_validation=False)  # OpenAI's own type lacks "paused"
    low = create(server, chat_rows, hyperparameters=hanging(5, steps=60))
    until(lambda: stopped(server, low.id))
    high = create(server, chat_rows, hyperparameters={"steps": 9999, "step_seconds": 0.05}, extra_body={"priority": 1})
    make_room(server, low.id)
    server.wait(high.id, "running")
    assert server.wait(low.id, "queued")
    assert client.fine_tuning.jobs.pause(low.id).status == "paused"
    client.fine_tuning.jobs.cancel(high.id)
    server.wait(high.id, "cancelled")
    until(lambda: held(server) == 0)
    assert client.fine_tuning.jobs.retrieve(low.id).status == "paused"
    client.fine_tuning.jobs.resume(low.id)
    assert server.wait(low.id).status == "succeeded"
    assert step_events(server, low.id) == list(range(1, 61))


def test_fifo_does_not_look_at_priorities(start_server, chat_rows):
    server = start_server("gpu.train=[0]")
    first = create(server, chat_rows, hyperparameters={"steps": 30, "step_seconds": 0.05})
    server.wait(first.id, "running")
    second = create(server, chat_rows, extra_body={"priority": 100})
    server.wait(second.id)
    assert server.client.fine_tuning.jobs.retrieve(first.id).status == "succeeded"  # before the second had begun
    assert not any("gave its devices" in text for text in messages(server, first.id))


def test_a_priority_has_bounds(server, chat_rows):
    file = server.upload(chat_rows)
    submit(server, file, priority=101).error(400, "integer_above_max_value", "priority")
    submit(server, file, priority=-101).error(400, "integer_below_min_value", "priority")
    submit(server, file, priority="high", method=supervised(steps=1)).error(400, "invalid_type", "priority")
