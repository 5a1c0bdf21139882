"""Nothing lives on without its storage: an attempt whose directory is gone, or cannot be written, ends within
`limits.room_seconds`. A full disk is no such case."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from attempts import attempt_order, ended, write_job_document
from disks import fill
from jobs import step_events, train
from live import LiveServer
from waiting import until

from arbor_core import AttemptOrder
from arbor_core.jobdir.documents import write_order
from arbor_core.process.lifecycle import process_ref
from arbor_core.process.resources import StorageLostError
from arbor_core.testing.invariants import processes
from arbor_core.types import CheckpointEvent, Placement
from arbor_core.worker.failures import explain
from arbor_core.worker.run import WorkerRun, open_run

FOREVER = "import os, sys, time; os.chdir('/'); open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


@contextmanager
def supervised(order: AttemptOrder, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A supervisor that holds no file of its attempt open, and the pid of its worker."""
    pid = tmp_path / "pid"
    order = msgspec.structs.replace(order, argv=(sys.executable, "-c", FOREVER, str(pid)), room_seconds=1.0)
    write_order(order, Placement((), 1))
    command = [sys.executable, "-m", "arbor_core.worker.supervisor", str(order.dir)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/")
    try:
        yield process, int(until(lambda: pid.exists() and pid.read_text()))
    finally:
        process.kill()
        process.communicate()


def ends_with_one_line(process: subprocess.Popen[str], worker: int) -> str:
    _, said = process.communicate(timeout=120)
    assert not process_ref(worker), "its worker lives on"
    [line] = said.splitlines()
    assert "no storage for 1 s" in line
    return line


def test_an_attempt_whose_directory_was_removed_ends(tmp_path: Path) -> None:
    order = attempt_order(tmp_path / "storage", "")
    with supervised(order, tmp_path) as (process, worker):
        shutil.rmtree(tmp_path / "storage")
        assert "No such file" in ends_with_one_line(process, worker)
    assert not (tmp_path / "storage").exists(), "nothing of it is made again"


def test_an_attempt_whose_disk_cannot_be_written_any_more_ends(small_disk: Path, tmp_path: Path) -> None:
    order = attempt_order(small_disk, "")
    with supervised(order, tmp_path) as (process, worker):
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        assert "Read-only file system" in ends_with_one_line(process, worker)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert not (order.dir / "exit.json").exists(), "the server finds out by itself"


def test_an_attempt_on_a_full_disk_goes_on_and_tells_its_end_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    order = attempt_order(small_disk, "")
    with supervised(order, tmp_path) as (process, worker):
        ballast = fill(small_disk)
        for nodes in range(10_000):  # a file of a few bytes takes a page, and none is left
            try:
                (small_disk / f"{nodes}").write_bytes(b"x")
            except OSError:
                break
        os.kill(worker, 9)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4)
        ballast.unlink()
        process.wait(120)
    found = ended(order)
    assert found is not None
    assert found.code == -9


@pytest.mark.slow
def test_the_server_settles_a_job_whose_directory_was_removed(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.room_seconds=1")
    job = train(server, chat_rows, steps=10_000, step_seconds=0.05, checkpoint_steps=10)
    until(lambda: step_events(server, job))
    shutil.rmtree(server.storage / "jobs" / job, ignore_errors=True)  # its worker may write meanwhile
    until(lambda: server.client.fine_tuning.jobs.retrieve(job).status == "failed")
    assert server.stop() == 0
    until(lambda: not processes(server.storage))


# --- the worker -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerRun[Any]:
    order = attempt_order(tmp_path, "", room_seconds=0.2)
    write_job_document(order, "x:y")
    monkeypatch.setattr("arbor_core.worker.run.RETRY_SECONDS", 0.05)
    return open_run(order.dir, WorkerRun)


def failing(run: WorkerRun[Any], monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[int]:
    """Let writing to the event log fail with these errors, one after the other, the last one for ever; those left."""
    left = list(codes)

    def write(handle: int) -> None:
        code = left[0] if len(left) == 1 else left.pop(0)
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", write)
    return left


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_worker_that_cannot_report_ends(run: WorkerRun[Any], monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    failing(run, monkeypatch, code)
    with pytest.raises(StorageLostError, match="no storage for 0.2 s") as caught:
        run.emit(CheckpointEvent(step=1, dir="1-1"))
    assert explain(run, caught.value) == 1, "and it does not try to say why for as long again"


def test_a_worker_on_a_full_disk_waits_for_room(run: WorkerRun[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    left = failing(run, monkeypatch, *[errno.ENOSPC] * 20, 0)
    run.emit(CheckpointEvent(step=1, dir="1-1"))
    assert left == [0]
    assert run.files.events.read_text().count('"1-1"') == 1


def test_a_fault_that_passes_loses_nothing(run: WorkerRun[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run.room_seconds = 600.0
    left = failing(run, monkeypatch, errno.EIO, errno.EIO, 0)
    run.emit(CheckpointEvent(step=1, dir="1-1"))
    assert left == [0]
    assert run.files.events.read_text().count('"1-1"') == 1
