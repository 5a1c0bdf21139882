"""Full disks, damaged databases and those that somebody holds. The ids `row_N` are rows of the table of faults.
A full disk is a small file system in memory; where it cannot be mounted, those tests are skipped."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import fill
from http_calls import FILE, PURPOSE, post
from jobs import check_and_stop, events, go_on, hanging, step_events, stopped, train
from live import ENDED, LiveServer
from waiting import until

from arbor_core.process.resources import DiskFullError, is_disk_full, wait_for_disk_space
from arbor_core.storage.directory import locked, network_kind
from arbor_core.storage.event_log import tail
from arbor_core.types import ArborError


def test_row_24_a_full_disk_delays_everything_and_loses_nothing(
    small_disk: Path, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("limits.free_bytes=0", storage=small_disk)
    client = server.new_client(_strict_response_validation=False)
    job = train(server, chat_rows, **hanging(12, steps=60, step_seconds=0.05, checkpoint_steps=10))
    until(lambda: stopped(server, job) and 12 in step_events(server, job))
    ballast = fill(small_disk)
    refused = post(server, PURPOSE, ("file", b"{}" * 100_000, "rows.jsonl"))
    refused.error(507, "insufficient_storage")
    assert refused.headers["x-should-retry"] == "false"
    log = next(server.storage.glob("jobs/*/attempts/1/worker.log"))
    until(lambda: no_room_left(small_disk) and client.fine_tuning.jobs.retrieve(job))
    heartbeat = log.parent / "heartbeat"
    before = heartbeat.stat().st_mtime_ns
    go_on(server, job)
    until(lambda: heartbeat.stat().st_mtime_ns != before)
    until(waits_for_room(heartbeat))
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
    job = train(server, chat_rows, **hanging(12, steps=30, checkpoint_steps=10))
    until(lambda: stopped(server, job) and 12 in step_events(server, job))
    ballast = fill(small_disk)
    go_on(server, job)
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
        "from arbor_core import MetricsEvent, ResultEvent\nfrom arbor_core.storage.event_log import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))\n"
        "said = [log.append(MetricsEvent(step=step, total_steps=21, values={})) for step in range(1, 21)]\n"
        "assert said[0] and not said[-1], said\n"
        "assert not log.flush(durable=True)\n"
        "before = Path(sys.argv[1]).read_bytes()\n"
        "assert before.endswith(b'\\n') and len(before) <= 200, before\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "assert log.append(ResultEvent(step=21, dir='21-1', trained_tokens=1), durable=True)\n"
        "assert Path(sys.argv[1]).read_bytes().startswith(before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [event.step for _, event in tail(path)] == list(range(1, 22))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


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
