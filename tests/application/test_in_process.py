"""A server in a program of one's own: in a thread of a notebook, without HTTP, and without a trace afterwards."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import notebook
import pytest
from waiting import until, until_async

from arbor_core import Arbor, ArborError, open_system, serve_settings
from arbor_core.config.settings import ServeConfig
from arbor_core.process.lifecycle import lives

pytest.importorskip("arbor_mock")
T = TypeVar("T")


@pytest.mark.parametrize("hydra", ["untouched", "foreign"])
def test_a_thread_of_a_notebook_has_a_server_twice_and_nothing_stays(tmp_path: Path, hydra: str) -> None:
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, notebook.__file__, str(tmp_path), hydra]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    for result in said["results"]:
        assert result["status"] == "succeeded" and result["answer"] == result["streamed"] != ""
        assert result["second"].endswith(f"is in use by another server (pid {result['pid']})")
        assert "rows.jsonl" in result["files"] and result["model"] in result["models"]
    assert len({result["model"] for result in said["results"]}) == 2
    assert not [path for path in (tmp_path / "storage").iterdir() if path.stat().st_mode & 0o077], "for its user alone"
    after = said["after"]
    assert after.pop("composed", None) == (FOREIGN if hydra == "foreign" else None)
    assert after == said["before"]
    assert "Traceback" not in ran.stderr and "never awaited" not in ran.stderr, ran.stderr


FOREIGN = {"launcher": {"rocket": True}, "port": "nowhere"}


def test_a_job_that_is_running_goes_on_without_its_server(tmp_path: Path) -> None:
    """Also one that was started cold, as all with several ranks are: asyncio would kill it, or keep a thread for it."""
    settings = serve_settings(f"storage={tmp_path}", "start=cold", "allocator=mock", "inference=mock", "+trainer=mock")
    long = {"type": "mock", "mock": {"hyperparameters": {"steps": 10_000, "step_seconds": 0.05}}}

    async def begin() -> tuple[str, str]:
        async with open_system(settings, default_trainer="mock").running() as arbor:
            file = await arbor.file_service.create((json.dumps(notebook.ROW).encode() + b"\n") * 12, "rows.jsonl")
            job = await arbor.job_service.create({"model": "mock/tiny", "training_file": file.id, "method": long})
            found = arbor.job_service.find(job.id)
            await until_async(lambda: arbor.job_service.list_events(found, 1).data[0].type == "metrics")
            return job.id, arbor.job_service.find(job.id).ref

    async def end(job_id: str) -> str:
        async with open_system(settings).running() as arbor:
            await arbor.job_service.ask(arbor.job_service.find(job_id), "cancel")
            return (await arbor.job_service.wait(job_id)).status

    before = {thread.name for thread in threading.enumerate()}
    job_id, ref = in_thread(begin)
    gc.collect()
    try:
        assert lives(ref)
        assert {thread.name for thread in threading.enumerate()} <= before
    finally:
        assert in_thread(lambda: end(job_id)) == "cancelled"
    until(lambda: not lives(ref))


def in_thread(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What a coroutine returns in a thread and an event loop of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()


@pytest.fixture
def settings(tmp_path: Path) -> ServeConfig:
    return serve_settings(f"storage={tmp_path}", "executor=mock", "allocator=mock", "inference=mock", "+trainer=mock")


def test_the_default_method_is_in_the_settings(settings: ServeConfig) -> None:
    system = open_system(settings)
    assert system.default_trainer == "mock"
    system.close()


def test_what_fails_to_open_holds_nothing(settings: ServeConfig, tmp_path: Path) -> None:
    (tmp_path / "arbor.db").write_bytes(b"no database" * 1000)
    for _ in range(2):
        with pytest.raises(ArborError, match="cannot open the database"):
            open_system(settings)
    (tmp_path / "arbor.db").unlink()
    open_system(settings).close()
    open_system(settings).close()


def broken(system: Arbor) -> Callable[[], Any]:
    """The dispatcher fails when this is called."""
    fail = asyncio.Event()

    async def run() -> None:
        await fail.wait()
        raise RuntimeError("no more")

    system.dispatcher.run = run  # type: ignore[method-assign]
    return fail.set


async def test_who_has_a_server_that_cannot_go_on_is_told(settings: ServeConfig) -> None:
    system, me = open_system(settings), asyncio.current_task()
    fail = broken(system)

    async def wait_for_ever() -> None:
        async with system.running():
            fail()
            await asyncio.Event().wait()

    with pytest.raises(ArborError, match="could not go on: no more") as caught:
        await wait_for_ever()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert me is not None and me.cancelling() == 0, "it goes on with its life"
    open_system(settings).close()


async def test_who_wants_to_be_called_is_called_instead(settings: ServeConfig) -> None:
    system, heard = open_system(settings), list[BaseException]()
    fail = broken(system)
    async with system.running(heard.append):
        fail()
        await until_async(lambda: heard)
    assert [str(error) for error in heard] == ["no more"]
    open_system(settings).close()


async def test_a_cancelled_owner_stays_cancelled(settings: ServeConfig) -> None:
    system, inside = open_system(settings), asyncio.Event()

    async def own() -> None:
        async with system.running():
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(own())
    await inside.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # again, while the server ends
    with pytest.raises(asyncio.CancelledError):
        await task
    open_system(settings).close()


async def test_a_server_runs_once(settings: ServeConfig) -> None:
    system = open_system(settings)
    async with system.running():
        pass
    with pytest.raises(ArborError, match="open another one"):
        async with system.running():
            pass
