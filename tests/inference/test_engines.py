"""When engines start, are shared, make room and end: real engine processes of the mock plugin."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from engines import loaded, used
from waiting import until_async

from arbor_core import Device, PoolAllocator, UnknownModelError, Weights
from arbor_core.engine import EngineProcess
from arbor_core.inference import starting
from arbor_core.inference.hanging import hanging
from arbor_core.inference.process import REF, end_engines, stalled_seconds
from arbor_core.inference.redaction import without_paths
from arbor_core.inference.served_model import Key
from arbor_core.models.fine_tuned import Resolved
from arbor_core.process.lifecycle import process_ref
from arbor_core.types import ApiError

arbor_mock = pytest.importorskip("arbor_mock")

PATIENCE = 120.0
ONE, TWO = (Resolved(name, name, f"/models/{name}") for name in ("one", "two"))


@pytest.fixture
def adapter(tmp_path: Path) -> Resolved:
    """An adapter on model `one`."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return Resolved("ft:one:x", ONE.base, ONE.base_path, Weights("ft:one:x", str(folder)))


async def test_first_requests_share_one_start(make):
    engines = make(devices=4, load_seconds=0.2)
    found = await asyncio.gather(*(used(engines, ONE) for _ in range(20)))
    assert len(set(found)) == 1
    assert engines.starter.count == 1
    assert engines.starter.allocator.free()["engine"] == 3
    assert await used(engines, TWO) is not found[0]


async def test_an_idle_engine_is_stopped_and_one_in_use_is_not(make):
    engines = make(idle_seconds=0)
    async with engines.using(ONE) as engine:
        await engines.tick()
        assert await engine.health()
    await engines.tick()
    assert engine.process.returncode is not None
    assert engines.models == {}
    assert engines.starter.allocator.free()["engine"] == 1
    assert not any(engines.root.iterdir())
    assert await used(engines, ONE) is not engine


async def test_a_recently_used_engine_is_not_idle(make):
    engines = make(idle_seconds=60)
    engine = await used(engines, ONE)
    await engines.tick()
    assert await engine.health()


async def test_the_next_request_after_a_death_starts_another(make, adapter):
    engines = make()
    first = await used(engines, adapter)
    os.killpg(first.process.pid, signal.SIGKILL)
    await until_async(lambda: not engines.models)
    assert engines.starter.allocator.free()["engine"] == 1
    second = await used(engines, adapter)
    assert second is not first
    assert await loaded(second) == ["ft:one:x"]


async def test_an_engine_that_does_not_answer_is_replaced(make, monkeypatch):
    engines = make()
    first = await used(engines, ONE)
    assert not await engines.suspect(first)
    assert await used(engines, ONE) is first
    os.kill(first.process.pid, signal.SIGSTOP)
    monkeypatch.setattr("arbor_core.inference.process.HEALTH_SECONDS", 0.2)
    monkeypatch.setattr("arbor_core.process.lifecycle.STOP_SECONDS", 0.2)
    assert await engines.suspect(first)
    assert await used(engines, ONE) is not first


class Told:
    """An engine that says of its progress what it was told to say, one look at a time."""

    def __init__(self, *answers: float | None) -> None:
        self.answers = list(answers)

    async def stalled_for(self, _: float) -> float | None:
        return self.answers.pop(0)


@pytest.mark.parametrize(
    ("answers", "left", "how"),
    [
        ([None] * 4, 0, "does not answer"),
        ([9.0] * 4, 0, "makes no progress with its work"),
        ([None, None, 9.0, 9.0, 0.0], 1, "makes no progress with its work"),
        ([None, None, None, 0.0, None, None, None, None], 0, "does not answer"),
        ([9.0, 9.0, 9.0, 0.001, 9.0, 9.0, 9.0, None, 0.0], 1, "does not answer"),
    ],
)
async def test_an_engine_hangs_after_four_looks_without_a_sign_of_life(answers, left, how):
    engine: Any = Told(*answers)
    assert await hanging(engine, 0.04) == how
    assert len(engine.answers) == left


@pytest.mark.parametrize("stuck", ["stopped", "loop"])
async def test_an_engine_that_hangs_is_killed_though_nothing_was_asked_of_it(make, adapter, stuck):
    engines = make(hang_seconds=2.0)
    first = await used(engines, adapter)
    if stuck == "stopped":
        os.killpg(first.process.pid, signal.SIGSTOP)
    else:
        body = {"model": "one", "prompt": "[mock: hang=1]"}
        async with aiohttp.ClientSession(headers=first.headers) as session:
            with pytest.raises(aiohttp.ClientError):
                await session.post(f"{first.url}/v1/completions", json=body)
    await until_async(lambda: not engines.models)
    engines.hang_seconds = 60.0  # of the next one, which is not to blame for a busy machine
    assert first.process.returncode == -signal.SIGKILL
    assert engines.starter.allocator.free()["engine"] == 1
    assert await used(engines, adapter) is not first


async def test_an_adapter_whose_engine_dies_may_be_asked_for_again(make, adapter):
    engines = make(hang_seconds=2.0)
    first = await used(engines, ONE)
    os.killpg(first.process.pid, signal.SIGSTOP)
    with pytest.raises(ApiError) as caught:
        await used(engines, adapter)
    assert (caught.value.code, caught.value.headers) == ("engine_unavailable", {"retry-after": "1"})
    engines.hang_seconds = 60.0
    await used(engines, adapter)


async def test_the_engine_not_used_for_longest_makes_room(make):
    engines = make(devices=2)
    one, two = await used(engines, ONE), await used(engines, TWO)
    assert await used(engines, ONE) is one
    await used(engines, Resolved("three", "three", "/models/three"))
    assert [model.key.name for model in engines.models.values()] == ["one", "three"]
    assert two.process.returncode is not None


async def test_a_start_waits_for_an_engine_in_use(make):
    engines = make(devices=1)
    async with engines.using(ONE) as engine:
        waiting = asyncio.create_task(used(engines, TWO))
        await until_async(lambda: Key(TWO.base, TWO.base_path) in engines.models)
        assert await engine.health()
        assert not waiting.done()
    await waiting
    assert [model.key.name for model in engines.models.values()] == ["two"]


async def test_two_starts_that_wait_both_get_their_turn(make):
    engines = make(devices=1)
    three = Resolved("three", "three", "/models/three")
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(used(engines, ONE), used(engines, TWO), used(engines, three))
    assert engines.starter.count == 3


async def test_row_118_a_model_that_takes_long_to_load_is_answered_model_loading(make):
    engines = make(load_seconds=0.6, load_wait=0.1)
    with pytest.raises(ApiError) as caught:
        await used(engines, ONE)
    assert (caught.value.status, caught.value.code) == (503, "model_loading")
    assert int(caught.value.headers["retry-after"]) > 0
    engines.load_wait = 60
    await used(engines, ONE)
    assert engines.starter.count == 1


async def test_an_engine_that_cannot_start_says_why_and_is_not_tried_at_once(make, monkeypatch):
    engines = make(load_error="these weights are from another world")
    for _ in range(3):
        with pytest.raises(ApiError, match="another world") as caught:
            await used(engines, ONE)
        assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")
        assert caught.value.headers == {"x-should-retry": "false"}
    assert engines.starter.count == 1
    assert engines.starter.allocator.free()["engine"] == 1
    monkeypatch.setattr(starting, "FAILURE_SECONDS", 0)
    engines.failures.failed.clear()
    engines.backends.default.options["load_error"] = None
    await used(engines, ONE)
    assert engines.starter.count == 2


async def test_a_model_that_is_not_there_is_a_404_and_takes_no_device(make, monkeypatch):
    engines = make(devices=1)
    good = await used(engines, ONE)
    looked = []

    async def find(path):
        looked.append(path)
        raise UnknownModelError(f"its directory {path} is not there")

    monkeypatch.setattr(engines.backends.default.backend, "find", find)
    for _ in range(3):
        with pytest.raises(ApiError, match="'two' does not exist: its directory two is not there") as caught:
            await used(engines, TWO)
        assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert looked == ["/models/two"]
    assert await used(engines, ONE) is good
    monkeypatch.undo()
    engines.failures.failed.clear()
    await used(engines, TWO)


async def test_without_a_device_to_serve_from_nothing_is_served(make):
    with pytest.raises(ApiError, match="this server has 0") as caught:
        await used(make(devices=0), ONE)
    assert caught.value.code == "engine_unavailable"


async def test_an_engine_does_not_start_here_with_a_device_that_is_elsewhere(make):
    engines = make()
    engines.starter.allocator = PoolAllocator({"engine": [Device("gpu-7", "mock", node="rack-3")]})
    with pytest.raises(ApiError, match="starts on the server's machine, and gpu-7 is on the node 'rack-3'"):
        await used(engines, ONE)
    assert engines.starter.allocator.free()["engine"] == 1


async def test_an_adapter_is_loaded_once(make, adapter, monkeypatch):
    engines = make()
    calls = []
    load = EngineProcess.load_weights

    async def counted(self, weights):
        calls.append(weights.name)
        await load(self, weights)

    monkeypatch.setattr(EngineProcess, "load_weights", counted)
    await asyncio.gather(*(used(engines, adapter) for _ in range(10)), used(engines, ONE))
    assert calls == ["ft:one:x"]
    assert engines.starter.count == 1


async def test_adapters_beyond_the_limit_go_in_order_of_use(make, adapter):
    engines = make(adapters=2)

    def named(name):
        return Resolved(name, adapter.base, adapter.base_path, Weights(name, adapter.adapter.path))

    for name in ("a", "b", "a", "c"):
        engine = await used(engines, named(name))
    await until_async(lambda: not any(model.adapters.unloading for model in engines.models.values()))
    assert await loaded(engine) == ["a", "c"]
    await used(engines, named("b"))
    assert "b" in await loaded(engine)


async def test_a_checkpoint_that_was_trained_again_is_loaded_again(make, adapter, monkeypatch):
    paths = []
    load = EngineProcess.load_weights

    async def noted(self, weights):
        paths.append(weights.path)
        await load(self, weights)

    monkeypatch.setattr(EngineProcess, "load_weights", noted)
    engines = make()
    again = Path(adapter.adapter.path).with_name("again")
    shutil.copytree(adapter.adapter.path, again)
    other = msgspec.structs.replace(adapter, adapter=Weights(adapter.name, str(again)))
    for resolved in (adapter, adapter, other, other):
        engine = await used(engines, resolved)
    assert paths == [adapter.adapter.path, str(again)]
    assert await loaded(engine) == [adapter.name]


async def test_a_deleted_model_is_unloaded(make, adapter):
    engines = make()
    engine = await used(engines, adapter)
    await engines.forget("ft:one:x")
    await until_async(lambda: not any(model.adapters.unloading for model in engines.models.values()))
    assert await loaded(engine) == []
    await engines.forget("one")
    assert engine.process.returncode is not None


async def test_an_adapter_that_cannot_be_loaded_leaves_the_engine_alone(make, adapter):
    engines = make()
    path = Path(adapter.adapter.path) / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(ApiError, match="cut off") as caught:
        await used(engines, adapter)
    assert str(path.parent.parent) not in str(caught.value)
    assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")
    await used(engines, ONE)
    path.write_bytes(whole)
    await used(engines, adapter)
    assert engines.starter.count == 1


async def test_a_request_that_gives_up_does_not_stop_the_start(make):
    engines = make(load_seconds=0.3)
    asked = asyncio.create_task(used(engines, ONE))
    await until_async(lambda: bool(engines.models))
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await used(engines, ONE)
    assert engines.starter.count == 1
    assert next(iter(engines.models.values())).users == 0


@pytest.mark.parametrize("end", ["stop", "close"])
async def test_an_engine_that_starts_ends_within_seconds(make, end):
    engines = make(load_seconds=600)
    starting = asyncio.create_task(used(engines, ONE))
    await until_async((engines.root / "1" / REF).exists)
    process = (engines.root / "1" / REF).read_text()
    async with asyncio.timeout(PATIENCE):
        await (engines.close() if end == "close" else engines.stop(next(iter(engines.models.values())), "idle"))
    await asyncio.gather(starting, return_exceptions=True)
    assert process_ref(int(process.partition(":")[0])) == ""
    assert engines.starter.allocator.free()["engine"] == 1


async def test_an_engine_that_is_stopped_while_it_starts_is_killed_and_the_next_request_starts_another(
    make, monkeypatch
):
    monkeypatch.setattr("arbor_core.inference.process.STOPPED_SECONDS", 0.2)
    engines = make(load_seconds=600)
    starting = asyncio.create_task(used(engines, ONE))
    await until_async((engines.root / "1" / REF).exists)
    process = (engines.root / "1" / REF).read_text()
    os.kill(int(process.partition(":")[0]), signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ApiError, match="loaded anew") as caught:
            await starting
    assert (caught.value.status, caught.value.headers) == (503, {"retry-after": "1"})
    assert process_ref(int(process.partition(":")[0])) == ""
    engines.backends.default.options["load_seconds"] = 0
    await used(engines, ONE)


async def test_closing_ends_every_process_even_one_that_starts(make):
    engines = make(devices=3, load_seconds=0.5)
    one = await used(engines, ONE)
    starting = asyncio.create_task(used(engines, TWO))
    await until_async((engines.root / "2" / "spec.json").exists)
    await engines.close()
    await asyncio.gather(starting, return_exceptions=True)
    assert one.process.returncode is not None
    assert engines.models == {}
    assert engines.starter.allocator.free()["engine"] == 3


async def test_scratch_directories_of_an_earlier_server_are_gone(make, tmp_path):
    (tmp_path / "engines" / "7").mkdir(parents=True)
    engines = make()
    assert not (tmp_path / "engines" / "7").exists()
    engine = await used(engines, ONE)
    spec = json.loads((engine.spec.dir / "spec.json").read_bytes())
    assert len(spec["token"]) > 20
    assert spec["model"] == "one"


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        (b"", 0.0),
        (b"ok", 0.0),
        (b"\xff", 0.0),
        (b"{}", 0.0),
        (b'{"quiet_seconds": 3, "status": "ok"}', 3.0),
        (b'{"stalled_seconds": 3, "status": "ok"}', 3.0),
        (b'{"stalled_seconds": 3, "quiet_seconds": 4}', 3.0),
    ],
)
def test_engines_that_say_nothing_of_their_progress_are_not_stuck(raw, seconds):
    assert stalled_seconds(raw) == seconds


@pytest.mark.parametrize(
    ("text", "known", "wanted"),
    [
        ("cannot load /srv/m/qwen: OSError", [], "cannot load qwen: OSError"),
        ("[Errno 2] No such file: '/a/b c/d.json'", ["/a/b c"], "[Errno 2] No such file: 'b c/d.json'"),
        ("in /my models/qwen/config.json, not", ["/my models/qwen"], "in qwen/config.json, not"),
        ("/my models/other is no model", ["/my models/qwen"], ".../other is no model"),
        ("a (/x/y/z) b [/x/y] /x", [], "a (z) b [y] /x"),
        ("see https://huggingface.co/org/name/resolve/main", [], "see https://huggingface.co/org/name/resolve/main"),
        ("org/name, 1/2 and/or 3 / 4", ["org/name"], "org/name, 1/2 and/or 3 / 4"),
        ("POST /v1/x at /", ["/x"], "POST x at /"),
    ],
)
def test_of_a_path_clients_hear_the_last_name(text, known, wanted):
    assert without_paths(text, *known) == wanted


def test_an_engine_that_was_stopped_while_it_started_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    stopped = subprocess.Popen(command, start_new_session=True)
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        for name, ref in (("1", process_ref(stopped.pid)), ("2", f"{other.pid}:1:another-boot"), ("3", "")):
            (tmp_path / name).mkdir()
            (tmp_path / name / REF).write_text(ref)
        end_engines(tmp_path)
        assert stopped.wait(PATIENCE) == -9
        assert other.poll() is None
    finally:
        for process in (stopped, other):
            process.kill()
            process.wait()
