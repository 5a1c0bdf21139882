"""Supervisors, fork servers and the executor `local`, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from attempts import PLACEMENT, attempt_order, ended, text_of, write_job_document
from jobs import alive
from waiting import until_async

from arbor_core import ArborError, Device, ExecutorSettings, Placement
from arbor_core.builtin.executor import ForkServerKey, LocalExecutor, runs
from arbor_core.data.validator import FileCheck
from arbor_core.dispatch.validation import validate
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.process.environment import clean_env
from arbor_core.process.lifecycle import lives as living
from arbor_core.process.lifecycle import process_ref, stat_fields
from arbor_core.process.places import hold, place_ref
from arbor_core.storage.event_log import tail


@pytest.fixture
async def executor(tmp_path):
    made = LocalExecutor(ExecutorSettings("warm", tmp_path / "run"))
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("code", "status"), [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)]
)
async def test_the_supervisor_writes_how_the_worker_ended(executor, tmp_path, code, status):
    order = attempt_order(tmp_path, code)
    ref = await executor.start(order, PLACEMENT)
    found = await until_async(lambda: ended(order))
    assert found.code == status
    await until_async(lambda: not living(ref))
    assert await executor.adopt(order.dir) == ref


async def test_a_signal_ends_the_worker_and_everything_it_started(executor, tmp_path):
    code = (
        "import os,subprocess,sys,time\n"
        "one=subprocess.Popen([sys.executable,'-c','import time;time.sleep(999)'])\n"
        "two=subprocess.Popen([sys.executable,'-c','import time;time.sleep(999)'],start_new_session=True)\n"
        "open('pids.tmp','w').write(f'{os.getpid()} {one.pid} {two.pid}')\n"
        "os.rename('pids.tmp','pids')\n"
        "time.sleep(999)"
    )
    order = attempt_order(tmp_path, code)
    ref = await executor.start(order, PLACEMENT)
    pids = [int(pid) for pid in (await until_async(lambda: text_of(order.dir / "pids"))).split()]
    assert living(ref) and all(map(alive, pids))
    await executor.signal(ref, signal.SIGTERM)
    assert (await until_async(lambda: ended(order))).code == -signal.SIGTERM
    assert not any(map(alive, pids))


async def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace(executor, tmp_path):
    code = (
        "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf','w').close(); time.sleep(999)"
    )
    order = attempt_order(tmp_path, code, grace=0.2)
    ref = await executor.start(order, PLACEMENT)
    await until_async((order.dir / "deaf").exists)
    await executor.signal(ref, signal.SIGTERM)
    assert (await until_async(lambda: ended(order))).code == -signal.SIGKILL


async def test_a_supervisor_that_is_killed_leaves_no_worker(executor, tmp_path):
    code = "import os,time; open('tmp','w').write(str(os.getpid())); os.rename('tmp','pid'); time.sleep(999)"
    order = attempt_order(tmp_path, code)
    ref = await executor.start(order, PLACEMENT)
    pid = int(await until_async(lambda: text_of(order.dir / "pid")))
    await executor.signal(ref, signal.SIGKILL)
    await until_async(lambda: not alive(pid))
    assert not living(ref) and ended(order) is None


async def test_a_killed_supervisor_takes_the_ranks_of_its_launcher_along(executor, tmp_path, monkeypatch):
    (tmp_path / "ranked.py").write_text(
        "import os,time\n"
        "def train(run):\n    open('tmp','w').write(str(os.getpid())); os.rename('tmp','pid'); time.sleep(999)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    launcher = "import subprocess,sys; subprocess.run(sys.argv[1:],start_new_session=True)"  # as torchrun does
    folder = tmp_path / "ftjob-x" / "attempts" / "1"
    rank = (sys.executable, "-c", launcher, sys.executable, "-m", "arbor_core.worker.main", str(folder))
    order = attempt_order(tmp_path, "", argv=rank, env={"RANK": "0", "WORLD_SIZE": "2"})
    write_job_document(order, "ranked:train")
    ref = await executor.start(order, PLACEMENT)
    pid = int(await until_async(lambda: text_of(order.dir / "pid")))
    await executor.signal(ref, signal.SIGKILL)
    await until_async(lambda: not alive(pid))


async def test_an_attempt_that_is_started_twice_runs_once(executor, tmp_path):
    order = attempt_order(tmp_path, "open('runs','a').write('x')")
    refs = [await executor.start(order, PLACEMENT) for _ in range(2)]
    await until_async(lambda: ended(order) and not any(map(living, refs)))
    assert text_of(order.dir / "runs") == "x"
    assert text_of(order.dir / "keeper") in refs
    assert "has another supervisor" in text_of(order.dir / "worker.log")


async def test_an_attempt_that_was_given_up_does_not_begin(executor, tmp_path):
    order = attempt_order(tmp_path, "open('runs','a').write('x')")
    assert await executor.adopt(order.dir) is None
    ref = await executor.start(order, PLACEMENT)
    await until_async(lambda: not living(ref))
    assert not (order.dir / "runs").exists() and ended(order) is None


def test_a_ref_is_not_mistaken_for_another_process():
    mine = process_ref(os.getpid())
    pid, start, boot = mine.split(":")
    assert living(mine)
    for other in (f"{pid}:{int(start) + 1}:{boot}", f"{pid}:{start}:another-boot", "", "mock:ftjob-x:1"):
        assert not living(other)


async def test_devices_of_another_node_are_refused(executor, tmp_path):
    order = attempt_order(tmp_path, "open('runs','a').write('x')")
    with pytest.raises(ArborError, match="gpu-7 is on the node 'rack-3': choose an executor that reaches it"):
        await executor.start(order, Placement((Device("gpu-7", node="rack-3"),), 1))
    assert await executor.adopt(order.dir) is None


def test_secrets_of_the_server_do_not_reach_a_worker(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HF_HOME", "/models")
    assert "OPENAI_API_KEY" not in clean_env()
    assert clean_env()["HF_HOME"] == "/models"


async def test_a_warm_worker_is_forked_from_imported_libraries(executor, tmp_path, monkeypatch):
    (tmp_path / "proving.py").write_text(
        "import fractions, os\nprint('a library that talks')\nPID = os.getpid()\ndef prove(): fractions.Fraction(1)\n"
        "def train(run): run.message('trained', imported_by=PID, seed=os.environ['PYTHONHASHSEED'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    executor.prepare(None, ("proving",), "proving:prove")
    order = attempt_order(tmp_path, "", argv=(), preload=("proving",), prove="proving:prove")
    write_job_document(order, "proving:train")
    ref = await executor.start(order, PLACEMENT)
    assert (await until_async(lambda: ended(order))).code == 0, text_of(order.dir / "worker.log")
    [(_, event)] = tail(order.dir / "events.jsonl")
    template = await executor.fork_server(ForkServerKey(sys.executable, ("proving",), "proving:prove"))
    assert event.data == {"imported_by": template.process.pid, "seed": "0"}
    assert ref.split(":")[0] != str(template.process.pid)
    assert not executor.faults


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ImportError('no such library')", "no such library"),
        ("import os\ndef prove(): os.abort()", "ended with status -6"),
        ("def prove(): raise RuntimeError('does not survive a fork')", "ended with status 1"),
    ],
)
async def test_libraries_that_do_not_survive_a_fork_start_cold(executor, tmp_path, monkeypatch, code, says):
    (tmp_path / "unproven.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    order = attempt_order(tmp_path, "", argv=(), preload=("unproven",), prove="unproven:prove")
    await executor.start(order, PLACEMENT)
    assert (await until_async(lambda: ended(order))).code == 1  # it ran, cold, as far as the missing job.json
    assert says in next(iter(executor.faults.values()))


async def test_a_template_that_dies_is_replaced(executor, tmp_path, monkeypatch):
    (tmp_path / "light.py").write_text("import fractions")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    key = ForkServerKey(sys.executable, ("light",), None)
    first = await executor.fork_server(key)
    first.process.kill()
    await first.process.wait()
    order = attempt_order(tmp_path, "", argv=(), preload=("light",))
    await executor.start(order, PLACEMENT)
    assert await until_async(lambda: ended(order))
    assert (await executor.fork_server(key)).process.pid != first.process.pid


async def test_a_template_that_is_killed_while_it_imports_is_no_fault_of_the_libraries(executor, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import os,pathlib,time\n"
        "if not pathlib.Path('slow.pid').exists():\n"
        "    open('slow.tmp','w').write(str(os.getpid())); os.rename('slow.tmp','slow.pid'); time.sleep(999)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    executor.prepare(None, ("slow",), None)
    os.kill(int(await until_async(lambda: text_of(tmp_path / "slow.pid"))), signal.SIGKILL)
    order = attempt_order(tmp_path, "", argv=(), preload=("slow",))
    await executor.start(order, PLACEMENT)  # cold
    assert await until_async(lambda: ended(order))
    assert not executor.faults
    assert (await executor.fork_server(ForkServerKey(sys.executable, ("slow",), None))).process.returncode is None


WAITING = (
    "import os,time\n"
    "def wait():\n    open('tmp','w').write(str(os.getpid())); os.rename('tmp','waiting'); time.sleep(999)\n"
)


@pytest.mark.parametrize("where", ["import", "proof"])
async def test_a_template_that_is_not_ready_ends_before_close_returns(executor, tmp_path, monkeypatch, where):
    (tmp_path / "slow.py").write_text(WAITING + ("wait()" if where == "import" else ""))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    executor.prepare(None, ("slow",), "slow:wait")
    pid = int(await until_async(lambda: text_of(tmp_path / "waiting")))
    parent = int(stat_fields(Path(f"/proc/{pid}/stat"))[1])
    await executor.close()
    assert not alive(pid) and (where == "import" or not alive(parent))


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def test_a_template_that_was_given_up_ends_before_close_returns(executor, tmp_path, monkeypatch):
    (tmp_path / "light.py").write_text("import fractions")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    template = await executor.fork_server(ForkServerKey(sys.executable, ("light",), None))
    template.process.send_signal(signal.SIGSTOP)
    await until_async(lambda: stopped(template.process.pid))  # else it takes the SIGTERM that follows first
    template.socket.unlink()
    await executor.start(attempt_order(tmp_path, "", argv=(), preload=("light",)), PLACEMENT)  # cold
    assert alive(template.process.pid)
    await executor.close()
    assert not alive(template.process.pid)


@pytest.fixture
async def killed_server(tmp_path, monkeypatch):
    """`await killed_server("python")` kills a server whose fork server has come that far; returns the pid of who waits
    there, once it goes on."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    server = (
        "import asyncio, pathlib\n"
        "from arbor_core import ExecutorSettings\n"
        "from arbor_core.builtin.executor import LocalExecutor\n"
        "async def serve():\n"
        "    LocalExecutor(ExecutorSettings('warm', pathlib.Path('run'))).prepare(None, ('slow',), 'slow:wait')\n"
        "    await asyncio.sleep(999)\n"
        "asyncio.run(serve())"
    )
    pids = []

    async def kill(where):
        held = "while not os.path.exists('killed'): time.sleep(0.01)\n"
        (tmp_path / "sitecustomize.py").write_text(
            "import os,sys,time\n"
            "if 'arbor_core.worker.forkserver' in sys.orig_argv:\n"
            f"    open('early','w').write(str(os.getpid()))\n    {held if where == 'python' else ''}"
        )
        (tmp_path / "slow.py").write_text(WAITING + ("wait()" if where == "import" else ""))
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", server, cwd=tmp_path)
        named = tmp_path / ("early" if where == "python" else "waiting")
        pids.extend([process.pid, int(await until_async(lambda: text_of(named)))])
        process.kill()
        await process.wait()
        (tmp_path / "killed").touch()
        return pids[-1]

    yield kill
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("where", ["python", "import", "proof"])
async def test_a_template_ends_with_a_server_that_is_killed_while_it_starts(killed_server, where):
    pid = await killed_server(where)
    await until_async(lambda: not alive(pid))


async def test_a_validator_that_is_killed_runs_again(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ -e struck ] || {{ touch struck; kill -9 $$; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    order = attempt_order(tmp_path, "")
    files = FileCheck("arbor_core.data.rows:check_chat_row", 1, str(order.dir / "data.jsonl"))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (order.dir / "data.jsonl").write_text((json.dumps(row) + "\n") * 12)
    with contextlib.chdir(tmp_path):
        report = await validate(files, str(python))
    assert (tmp_path / "struck").exists()
    assert report.error is None
    assert report.rows == {"training_file": 12}


async def test_a_template_that_does_not_answer_is_ended_and_its_place_taken(executor, tmp_path, monkeypatch):
    (tmp_path / "light.py").write_text("import fractions")
    (tmp_path / "other.py").write_text("import decimal")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    key = ForkServerKey(sys.executable, ("light",), None)
    first = await executor.fork_server(key)
    other = await executor.fork_server(ForkServerKey(sys.executable, ("other",), None))
    first.socket.unlink()
    order = attempt_order(tmp_path, "pass", argv=(), preload=("light",))
    await executor.start(order, PLACEMENT)  # cold
    await first.process.wait()
    second = await executor.fork_server(key)
    assert second.process.pid != first.process.pid
    assert second.socket != other.socket


async def test_a_validator_ends_with_the_server(tmp_path):
    order = attempt_order(tmp_path, "")
    text = msgspec.json.encode(FileCheck("builtins:len", 1, str(order.dir / "data.jsonl"))).decode()
    os.mkfifo(order.dir / "data.jsonl")
    start = "import subprocess,sys,time; print(subprocess.Popen(sys.argv[1:]).pid,flush=True); time.sleep(999)"
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        start,
        sys.executable,
        "-m",
        "arbor_core.data.validator",
        text,
        stdout=-1,
    )
    pid = int(await server.stdout.readline())
    with await asyncio.to_thread((order.dir / "data.jsonl").open, "wb"):  # opens when the validator reads
        server.kill()
        await server.wait()
        await until_async(lambda: not alive(pid))


async def test_row_113_a_pid_that_was_given_to_another_is_neither_adopted_nor_killed(tmp_path: Path) -> None:
    executor = LocalExecutor(ExecutorSettings("cold", tmp_path))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"]) as foreign:
        pid, start, boot = process_ref(foreign.pid).split(":")
        for ref in (f"{pid}:{int(start) - 1}:{boot}", f"{pid}:{start}:{'0' * len(boot)}"):
            assert not await executor.poll({ref: tmp_path})
            await executor.signal(ref, signal.SIGKILL)
            await executor.end(ref)
        assert await executor.poll({f"{pid}:{start}:{boot}": tmp_path})
        assert foreign.poll() is None
        foreign.kill()


def test_a_supervisor_of_another_namespace_is_seen_by_its_claim_and_its_lock(tmp_path):
    attempt = AttemptDir(tmp_path)
    ref = place_ref(os.getpid(), tmp_path).replace(str(os.getpid()), "999999999", 1)
    assert not runs(ref, tmp_path)
    assert attempt.claim(ref) == ref
    assert not runs(ref, tmp_path)
    handle = hold(tmp_path)
    assert runs(ref, tmp_path)
    assert not runs(ref.replace("999999999", "999999998", 1), tmp_path), "it is run by somebody else"
    os.close(handle)
    assert not runs(ref, tmp_path)
