"""The executor `mock_node` and the process that stands for its machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
from arbor_mock import arbor_allocators, node_executor
from arbor_mock import node as node_module
from arbor_mock.config import NODE
from arbor_mock.node import Node
from arbor_mock.node_executor import NodeExecutor
from attempts import attempt_order, ended, text_of
from waiting import until_async

from arbor_core import AllocatorSettings, ArborError, Device, ExecutorSettings, Placement
from arbor_core.testing import check_executor
from arbor_core.testing.invariants import processes

PLACEMENT = Placement((Device("mock:0", "mock", node=NODE),), threads=1)
ROWS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 10
SLEEP = "import os,time; open('tmp','w').write(str(os.getpid())); os.rename('tmp','pid'); time.sleep(999)"


def test_it_conforms():
    check_executor(
        node_executor,
        trainer="mock",
        rows=ROWS,
        model="mock/tiny",
        hyperparameters={"steps": 9999, "step_seconds": 0.05},
        devices=(Device("mock:0", "mock", node=NODE),),
    )


@pytest.fixture
async def executor(tmp_path):
    made = NodeExecutor(ExecutorSettings("cold", tmp_path / "run"))
    yield made
    await until_async(lambda: not nodes(tmp_path))  # it ends by itself when nothing is left to do


def nodes(folder):
    return [pid for pid, words in processes(folder).items() if "arbor_mock.node" in words]


async def test_devices_of_other_machines_are_refused(executor, tmp_path):
    with pytest.raises(ArborError, match="starts attempts on 'mock-node', not on 'rack-3'"):
        await executor.start(attempt_order(tmp_path, "pass"), Placement((Device("gpu", node="rack-3"),), 1))
    assert not nodes(tmp_path)


async def test_only_the_devices_to_train_on_are_there():
    inventory = arbor_allocators()["mock_node"](AllocatorSettings(None, None)).inventory()
    assert {pool: {device.node for device in devices} for pool, devices in inventory.items()} == {
        "train": {NODE},
        "engine": {""},
    }


async def test_servers_that_start_it_at_the_same_time_share_one(executor, tmp_path):
    others = [NodeExecutor(ExecutorSettings("cold", tmp_path / "run")) for _ in range(3)]
    orders = [attempt_order(tmp_path, SLEEP, name=str(number)) for number in range(1, 5)]
    all_of_them = [executor, *others]
    refs = await asyncio.gather(*(one.start(order, PLACEMENT) for one, order in zip(all_of_them, orders, strict=True)))
    assert len(set(refs)) == 4
    for one in all_of_them:
        assert set(await one.poll({ref: order.dir for ref, order in zip(refs, orders, strict=True)})) == set(refs)
    await until_async(lambda: len(nodes(tmp_path)) == 1)
    await asyncio.gather(*(executor.end(ref) for ref in refs))
    assert not await executor.poll({ref: order.dir for ref, order in zip(refs, orders, strict=True)})


async def test_the_next_machine_begins_when_nothing_of_the_last_lives(executor, tmp_path):
    order = attempt_order(tmp_path, SLEEP)
    ref = await executor.start(order, PLACEMENT)
    worker = int(await until_async(lambda: text_of(order.dir / "pid")))
    [machine] = nodes(tmp_path)
    os.kill(worker, signal.SIGSTOP)
    os.kill(machine, signal.SIGKILL)
    await until_async(lambda: not nodes(tmp_path))
    assert await executor.poll({ref: order.dir}) == {}
    assert await executor.adopt(order.dir) == ref  # asked of the next one
    await executor.end(ref)
    assert worker not in processes(tmp_path)
    assert ended(order) is None
    again = await executor.start(order, PLACEMENT)
    assert await executor.poll({again: order.dir}) == {}


async def test_what_was_given_up_is_remembered_by_the_next_machine(executor, tmp_path):
    order = attempt_order(tmp_path, "open('runs','a').write('x')")
    assert await executor.adopt(order.dir) is None
    for machine in nodes(tmp_path):
        with contextlib.suppress(ProcessLookupError):  # it ends by itself
            os.kill(machine, signal.SIGKILL)
    await until_async(lambda: not nodes(tmp_path))
    ref = await executor.start(order, PLACEMENT)
    assert await executor.poll({ref: order.dir}) == {}
    assert not (order.dir / "runs").exists()


async def test_an_attempt_that_is_just_begun_is_not_taken_for_one_that_has_ended(tmp_path, monkeypatch):
    """A server asks for it, and whether it lives, while another one's start is still on its way."""
    really, order = asyncio.create_subprocess_exec, attempt_order(tmp_path, SLEEP)
    slow = asyncio.Event()

    async def create(*argv, **options):
        await slow.wait()
        return await really(*argv, **{**options, "pass_fds": ()})

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)
    node = Node(tmp_path / "node", lock=-1)
    argv = [*order.argv]
    starting = asyncio.create_task(node.start(str(order.dir), argv, {}, grace=1.0, room=1.0, bell=None))
    adopting = asyncio.create_task(node.adopt(str(order.dir)))
    await asyncio.sleep(0)
    slow.set()
    ref = await adopting
    assert ref in await node.poll([ref])
    assert await starting == ref
    await node.end(ref)
    assert not await node.poll([ref])


async def test_a_machine_that_answers_is_not_idle(tmp_path, monkeypatch):
    """A process may take longer to start than the machine waits for calls."""
    monkeypatch.setattr(node_module, "IDLE_SECONDS", -1.0)
    node, go_on = Node(tmp_path, lock=-1), asyncio.Event()
    seen = []

    async def poll(refs):
        seen.append(node.idle())
        await go_on.wait()
        return {}

    monkeypatch.setattr(node, "poll", poll)
    server = await asyncio.start_unix_server(node.answer, tmp_path / "socket")
    async with server:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(b'{"do": "poll", "refs": []}\n')
        await until_async(lambda: seen)
        assert not node.idle()
        go_on.set()
        assert await reader.readline() == b'{"answer":{}}\n'
        await until_async(node.idle)
        writer.close()
    assert seen == [False]


async def test_a_call_that_cannot_be_answered_is_an_error_and_the_machine_goes_on(executor, tmp_path):
    order = attempt_order(tmp_path, "pass")
    call = {"argv": ["/no/such/python"], "env": {}, "grace": 1.0, "room": 1.0, "bell": None}
    with pytest.raises(OSError, match="cannot start: FileNotFoundError"):
        await executor.call("start", attempt=str(order.dir), **call)
    with pytest.raises(OSError, match="cannot fly: KeyError"):
        await executor.ask("fly")
    assert await executor.ask("poll", refs=[]) == {}
