"""Full disks, damaged databases and checkpoints, clocks and pids that lie. The ids `row_N` are rows of the table of
faults. A full disk is a small file system in memory; where it cannot be mounted, those tests are skipped."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import fill
from http_calls import FILE, PURPOSE, post
from jobs import check_and_stop, events, step_events, train
from live import ENDED, LiveServer
from waiting import until

from arbor_core import Event, ExecutorSettings
from arbor_core.builtin.executor import LocalExecutor
from arbor_core.dispatch import ingest
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.observers import Observers
from arbor_core.dispatch.outcome import Outcomes
from arbor_core.jobdir import checkpoints
from arbor_core.jobdir.cleanup import reconciled, sweep
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.plugins import Plugins
from arbor_core.process import lifecycle
from arbor_core.process.lifecycle import kill_session, process_ref
from arbor_core.process.resources import DiskFullError, is_disk_full, wait_for_disk_space
from arbor_core.storage.database import Store
from arbor_core.storage.directory import locked, network_kind
from arbor_core.storage.event_log import EventLog, tail
from arbor_core.testing import JobDirectory
from arbor_core.types import ArborError


def test_row_24_a_full_disk_delays_everything_and_loses_nothing(
    small_disk: Path, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.free_bytes=0", storage=small_disk)
    client = server.new_client(_strict_response_validation=False)
    job = train(server, chat_rows, steps=60, step_seconds=0.05, checkpoint_steps=10)
    until(lambda: list(server.client.fine_tuning.jobs.checkpoints.list(job)))
    ballast = fill(small_disk)
    refused = post(server, PURPOSE, ("file", b"{}" * 100_000, "rows.jsonl"))
    refused.error(507, "insufficient_storage")
    assert refused.headers["x-should-retry"] == "false"
    log = next(server.storage.glob("jobs/*/attempts/1/worker.log"))
    until(lambda: no_room_left(small_disk) and client.fine_tuning.jobs.retrieve(job))
    until(waits_for_room(log.parent / "heartbeat"))
    assert client.fine_tuning.jobs.retrieve(job).status == "running", log.read_text()
    ballast.unlink()
    assert server.wait(job).status == "succeeded", server.log
    assert step_events(server, job) == list(range(1, 61)), [e.message for e in events(server, job)] + [log.read_text()]
    assert not list((server.storage / "files" / ".incoming").iterdir())
    check_and_stop(server)


def waits_for_room(heartbeat: Path) -> Callable[[], bool]:
    """Whether a trainer of quick steps has come to a checkpoint for which there is no room: only between two looks for
    room do two seconds pass without a beat."""
    beats = [heartbeat.stat().st_mtime]

    def look() -> bool:
        beats.append(heartbeat.stat().st_mtime)
        return beats[-1] - beats[-2] > 1.9

    return look


def no_room_left(folder: Path) -> bool:
    return os.statvfs(folder).f_bavail == 0


def test_row_95_a_checkpoint_that_finds_no_room_pauses_the_job(
    small_disk: Path, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.free_bytes=0", "limits.room_seconds=0.3", storage=small_disk)
    client = server.new_client(_strict_response_validation=False)
    job = train(server, chat_rows, steps=30, step_seconds=0.05, checkpoint_steps=10)
    until(lambda: list(server.client.fine_tuning.jobs.checkpoints.list(job)))
    ballast = fill(small_disk)
    log = next(server.storage.glob("jobs/*/attempts/1/worker.log"))
    until(lambda: "DiskFullError" in log.read_text() or no_room_for_words(server, job))
    ballast.unlink()
    until(lambda: client.fine_tuning.jobs.retrieve(job).status in ("paused", *ENDED))
    found = client.fine_tuning.jobs.retrieve(job)
    assert found.status == "paused", [e.message for e in events(server, job)] + [log.read_text()]
    last = next(event for event in events(server, job)[::-1] if event.level == "error")
    assert last.data["code"] == "insufficient_storage"
    assert "make room and resume it" in last.message
    client.fine_tuning.jobs.resume(job)
    assert server.wait(job).status == "succeeded"
    assert not any("died" in event.message for event in events(server, job))
    check_and_stop(server)


def no_room_for_words(server: LiveServer, job: str) -> bool:
    """On a full disk not even the worker's log can tell: its scratch directory is gone when it waits to say so."""
    return not (server.storage / "jobs" / job / "attempts" / "1" / "work").exists()


def test_row_95_waiting_for_room_is_bounded_and_beats(tmp_path: Path) -> None:
    beats: list[int] = []
    with pytest.raises(DiskFullError) as caught:
        wait_for_disk_space(tmp_path, 1 << 60, 0.2, lambda: beats.append(1))
    assert beats
    assert is_disk_full(caught.value, tmp_path)
    wait_for_disk_space(tmp_path, 0, 0.0, lambda: None)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("SafetensorError: IoError: No space left on device (os error 28)"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (OSError(13, "Permission denied"), False),
        (ValueError("loss is not a number"), False),
    ],
)
def test_row_95_a_full_disk_is_told_from_other_faults(tmp_path: Path, error: Exception, full: bool) -> None:
    assert is_disk_full(error, tmp_path) is full
    outer = ArborError("saving failed")
    outer.__cause__ = error
    assert is_disk_full(outer, tmp_path) is full


def test_a_log_that_has_no_room_keeps_its_records_whole(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond a limit."""
    path = tmp_path / "events.jsonl"
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from arbor_core import Event\nfrom arbor_core.storage.event_log import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))\n"
        "said = [log.append(Event('metrics', step=step)) for step in range(1, 21)]\n"
        "assert said[0] and not said[-1], said\n"
        "assert not log.flush(durable=True)\n"
        "before = Path(sys.argv[1]).read_bytes()\n"
        "assert before.endswith(b'\\n') and len(before) <= 200, before\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "assert log.append(Event('result', step=21), durable=True)\n"
        "assert Path(sys.argv[1]).read_bytes().startswith(before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [event.step for _, event in tail(path, 0, Event)] == list(range(1, 22))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# --- hung trainers ----------------------------------------------------------------------------------------------------


def test_row_90_a_trainer_that_hangs_is_ended_and_tried_again(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=2")
    job = train(server, chat_rows, steps=6, step_seconds=0.05, checkpoint_steps=2, fault="hang", fault_step=4)
    found = server.wait(job)
    assert found.status == "succeeded", found.error
    said = [event.message for event in events(server, job)]
    assert any("made no progress for 2 seconds" in text and "checkpoint at step 4" in text for text in said), said
    check_and_stop(server)


def test_row_90_a_trainer_that_keeps_hanging_fails(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.heartbeat_seconds=1", "limits.attempts=1")
    job = train(server, chat_rows, steps=6, step_seconds=0.05, checkpoint_steps=6, fault="hang", fault_step=2)
    found = server.wait(job, "failed")
    assert found.error.code == "worker_hung"
    check_and_stop(server)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def committed(job_dir: Path, step: int, attempt: int) -> Path:
    folder = job_dir / "checkpoints" / f"{step}-{attempt}"
    with checkpoints.writing(folder, step, attempt, {"train_loss": 1.0}) as inside:
        (inside / "weights").write_bytes(b"1234")
    return folder


def test_row_93_checkpoints_without_an_event_are_found(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "attempts" / "2" / "events.jsonl")
    committed(tmp_path, 2, 1)
    for step in (4, 6, 8):
        committed(tmp_path, step, 2)
    log.append(Event("checkpoint", step=4, data={"dir": "4-2"}))
    log.append(Event("discarded", data={"dir": "6-2"}))
    [found] = reconciled(JobDir(tmp_path).attempt(2))
    assert (found.type, found.step, found.data) == ("checkpoint", 8, {"dir": "8-2", "metrics": {"train_loss": 1.0}})
    assert not (tmp_path / "checkpoints" / "6-2").exists(), "one that was discarded is removed"
    assert (tmp_path / "checkpoints" / "2-1").exists()


def test_what_a_killed_process_leaves_is_swept(tmp_path: Path) -> None:
    kept = [tmp_path / "job.json", tmp_path / "attempts/1/events.jsonl", tmp_path / "checkpoints/2-1/weights"]
    left = ["checkpoints/4-1.tmp/weights", "attempts/1/work/x", ".desired.7.tmp", "attempts/1/.keeper.9"]
    for path in (*kept, *(tmp_path / name for name in left)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    sweep(JobDir(tmp_path))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


SLEEP = [sys.executable, "-c", "import time; time.sleep(999)"]


def test_what_outlives_its_keeper_is_ended(tmp_path: Path) -> None:
    start = f"import os, subprocess; print(subprocess.Popen({SLEEP}, stdout=2).pid, flush=True); input(); os.abort()"
    keeper = subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert keeper.stdout is not None
    stray = int(keeper.stdout.readline())
    ref = process_ref(keeper.pid)
    keeper.communicate("go on\n", timeout=10)
    with subprocess.Popen(SLEEP, cwd=tmp_path) as other:
        assert process_ref(stray)
        kill_session(ref)
        assert not process_ref(stray)
        assert other.poll() is None
        other.kill()


def test_row_113_a_session_that_was_given_to_another_is_left_alone() -> None:
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, ('я' * 8).encode(), 0, 0, 0)"  # cut inside a letter
    foreign = subprocess.Popen([sys.executable, "-c", f"{rename}; {SLEEP[2]}"], start_new_session=True)
    try:
        while not (cut := Path(f"/proc/{foreign.pid}/comm").read_bytes()).startswith("я".encode()):
            assert foreign.poll() is None
        with pytest.raises(UnicodeDecodeError):
            cut.decode()
        pid, start, boot = process_ref(foreign.pid).split(":")
        for ref in (f"{pid}:{int(start) - 1}:{boot}", f"{pid}:{start}:{'0' * len(boot)}"):
            kill_session(ref)
        assert foreign.poll() is None
        kill_session(f"{pid}:{start}:{boot}")
        assert foreign.wait(10) == -signal.SIGKILL
    finally:
        foreign.kill()
        foreign.wait()


def test_a_session_that_does_not_end_is_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "KILL_SECONDS", 0.1)
    with subprocess.Popen(SLEEP, start_new_session=True) as stuck, monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: None)  # as if it hung in the kernel
        with pytest.raises(TimeoutError, match=str(stuck.pid)):
            kill_session(process_ref(stuck.pid))
        patch.undo()
        stuck.kill()


@pytest.mark.parametrize("damaged", [[4], [2, 4]], ids=["falls-back", "none-is-left"])
def test_row_94_damaged_checkpoints(tmp_path: Path, chat_rows: list[dict[str, Any]], damaged: list[int]) -> None:
    hyper = {"steps": 6, "step_seconds": 0, "checkpoint_steps": 2, "fault": "crash", "fault_step": 5}
    job = JobDirectory(tmp_path / "job", "mock", chat_rows, "mock/tiny", hyper)
    assert job.attempt() == -signal.SIGKILL
    for step in damaged:
        (job.dir / "checkpoints" / f"{step}-1" / "adapter_model.safetensors").write_bytes(b"")
    status = job.attempt()
    told = [event.message for event in job.events() if event.level == "error"]
    assert "checkpoint 4-1 is not used" in told[0]
    if damaged == [4]:
        assert status == 0
        assert [event.data["step"] for event in job.events("metrics")] == [3, 4, 5, 6]
    else:
        assert status == 1
        [error] = job.events("error")
        assert error.data["code"] == "checkpoint_corrupted"
        assert not job.events("metrics")


# --- the database and the directory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["header", "pages"])
def test_row_110_a_damaged_database_is_refused_and_left_alone(
    tmp_path: Path, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], damage: str
) -> None:
    server = start_server()
    server.wait(train(server, chat_rows, steps=1, step_seconds=0))
    server.stop()
    path = server.storage / "arbor.db"
    raw = bytearray(path.read_bytes())
    raw[0 if damage == "header" else 4096 : 100 if damage == "header" else len(raw) - 100] = b"\xff" * (
        100 if damage == "header" else len(raw) - 4196
    )
    path.write_bytes(raw)
    with pytest.raises(RuntimeError, match=r"cannot open the database .*\.recover"):
        start_server()
    assert path.read_bytes() == raw


def test_row_110_a_directory_that_cannot_be_written_is_refused(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ArborError, match=r"cannot write to the storage directory .* Read-only file system"):
        locked(small_disk)


@pytest.mark.parametrize(
    ("kind", "refused"), [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("ext4", False), ("tmpfs", False)]
)
def test_row_110_network_file_systems_are_known(tmp_path: Path, kind: str, refused: bool) -> None:
    mounts, share = tmp_path / "mounts", tmp_path / "a share"
    escaped = str(share).replace(" ", "\\040")
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/export {escaped} {kind} rw 0 0\n")
    assert network_kind(share / "storage", mounts) == (kind if refused else None)
    assert network_kind(tmp_path, mounts) is None


def test_row_111_a_database_that_somebody_holds_is_busy_and_nothing_is_lost(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server()
    job = train(server, chat_rows, steps=20, step_seconds=0.02)
    until(lambda: step_events(server, job))
    with sqlite3.connect(server.storage / "arbor.db", isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        answer = post(server, PURPOSE, FILE)
        holder.execute("ROLLBACK")
    answer.error(503, "database_busy")
    assert int(answer.headers["retry-after"]) > 0
    assert server.wait(job).status == "succeeded"
    assert step_events(server, job) == list(range(1, 21))
    assert len([path for path in (server.storage / "files").iterdir() if path.is_file()]) == 2, "rows and result"
    check_and_stop(server)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT])
async def test_an_attempt_that_finds_no_room_to_start_is_paused(tmp_path: Path, plugins: Plugins, code: int) -> None:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    unused: Any = None
    outcomes = Outcomes(jobs, unused, Ingest(jobs, Observers(plugins), tmp_path, "arbor"), tmp_path, unused)
    spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
    job = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    await jobs.transition(job, "queued")
    await jobs.transition(jobs.get(job.id) or job, "running", attempt=1)
    await outcomes.not_started(jobs.get(job.id) or job, OSError(code, os.strerror(code)))
    found = jobs.get(job.id)
    assert found is not None
    if code == errno.ENOSPC:
        assert (found.status, found.desired, found.error) == ("paused", "pause", None)
        assert (jobs.events(job.id, 1)[0].data or {})["code"] == "insufficient_storage"
    else:
        assert found.status == "failed"
        assert found.error is not None
        assert found.error.code == "worker_not_started"
    store.close()


async def test_any_number_of_events_is_taken(tmp_path: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "BATCH", 1)
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    collecting = Ingest(jobs, Observers(plugins), tmp_path, "arbor")
    spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
    job = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    count = 1 + sys.getrecursionlimit()
    collecting.attempt_dir(job).path.mkdir(parents=True)
    collecting.attempt_dir(job).events.write_bytes(b'{"type":"message","message":"again"}\n' * count)
    await collecting.collect(job)
    assert sum(event.message == "again" for event in jobs.events(job.id, 9999)) == count
    store.close()


async def test_row_112_a_clock_that_jumps_back_reorders_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    job = await jobs.create(
        NewJob("me", "file-x", None, None, {}, JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1))
    )
    for at in (2e9, 1e9, 3e9):
        await jobs.ingest(job, [Event("message", f"{at:g}", at=at)], job.offset, "m")
    times = [event.created_at for event in jobs.events(job.id, 100)][::-1]
    assert times[-3:] == [2_000_000_000, 2_000_000_000, 3_000_000_000]
    assert times == sorted(times)
    store.close()


def test_row_113_a_pid_that_was_given_to_another_is_neither_adopted_nor_killed(tmp_path: Path) -> None:
    executor = LocalExecutor(ExecutorSettings("cold", tmp_path))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"]) as foreign:
        pid, start, boot = process_ref(foreign.pid).split(":")
        for ref in (f"{pid}:{int(start) - 1}:{boot}", f"{pid}:{start}:{'0' * len(boot)}"):
            assert not executor.adopt(ref)
            executor.signal(ref, signal.SIGKILL)
        assert executor.adopt(f"{pid}:{start}:{boot}")
        assert foreign.poll() is None
        foreign.kill()
