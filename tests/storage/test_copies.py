"""A storage directory that is moved or copied while its processes live. The copy goes on from what it holds and touches
nothing of the original; what was moved goes on where it is now."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import step_events, train
from live import LiveServer, engine_dir, process_of
from waiting import until

from arbor_core.jobdir.layout import AttemptDir, JobDir
from arbor_core.process.lifecycle import lives
from arbor_core.process.places import belongs, hold, is_held, lives_in, moved_to, place_ref
from arbor_core.worker.supervisor import StorageWatch

STEPS: dict[str, Any] = {"steps": 10_000, "step_seconds": 0.05, "checkpoint_steps": 5}


def copied(storage: Path, to: Path) -> Path:
    """A copy of a storage directory whose server goes on meanwhile."""
    to.mkdir()
    subprocess.run(["cp", "-a", str(storage), str(to)], check=False, stderr=subprocess.DEVNULL)  # files come and go
    copy = to / storage.name
    for name in ("arbor.db", "arbor.db-wal", "arbor.db-shm"):
        (copy / name).unlink(missing_ok=True)
    with sqlite3.connect(storage / "arbor.db") as db, sqlite3.connect(copy / "arbor.db") as other:
        db.backup(other)
    return to


def attempt_of(server: LiveServer, job: str) -> int:
    return len(JobDir.of(server.storage, job).attempts())


def supervisor(server: LiveServer, job: str) -> str:
    """The ref of who runs a job's first attempt."""
    return JobDir.of(server.storage, job).attempt(1).supervisor.read_text()


def test_a_server_on_a_copy_leaves_the_originals_processes_alone(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    server = start_server(storage=tmp_path / "original")
    job = train(server, chat_rows, **STEPS)
    until(lambda: max(step_events(server, job), default=0) > 5)
    say = {"model": "mock/tiny", "messages": [{"role": "user", "content": "hi"}]}
    assert server.client.chat.completions.create(**say).choices
    engine = process_of(engine_dir(server))

    copy = start_server(storage=copied(server.storage, tmp_path / "copy"))
    until(lambda: attempt_of(copy, job) == 2)  # the first is the original's, and is not waited for
    until(lambda: copy.client.fine_tuning.jobs.retrieve(job).status == "running")
    copy.client.fine_tuning.jobs.cancel(job)
    copy.wait(job, "cancelled")
    assert copy.client.chat.completions.create(**say).choices
    assert process_of(engine_dir(copy)) != engine

    assert lives(supervisor(server, job))
    seen = max(step_events(server, job))
    until(lambda: max(step_events(server, job)) > seen)
    assert attempt_of(server, job) == 1
    assert process_of(engine_dir(server)) == engine
    assert server.client.chat.completions.create(**say).choices
    server.cancel_all()


def test_a_job_goes_on_where_its_storage_was_moved_to(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    server = start_server(storage=tmp_path / "before")
    job = train(server, chat_rows, **{**STEPS, "steps": 200})
    until(lambda: max(step_events(server, job), default=0) > 5)
    ref = supervisor(server, job)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(120)
    (tmp_path / "before").rename(tmp_path / "after")

    moved = start_server(storage=tmp_path / "after")
    assert moved.wait(job, "succeeded").trained_tokens
    assert not lives(ref)
    assert attempt_of(moved, job) == 2, "the attempt that was moved ended"
    assert JobDir.of(moved.storage, job).attempt(1).exit.exists(), "and told so where it is now"
    assert not (tmp_path / "before").exists()


def test_a_supervisor_that_was_moved_writes_nothing_into_what_was_put_in_its_place(tmp_path: Path) -> None:
    attempt = AttemptDir(tmp_path / "before")
    attempt.path.mkdir()
    storage = StorageWatch(attempt, 60.0, hold(attempt.path))
    attempt.path.rename(tmp_path / "after")
    attempt.path.mkdir()
    assert storage.lost()
    storage.write_exit(b"{}")
    assert not list(attempt.path.iterdir())
    assert (tmp_path / "after" / "exit.json").read_bytes() == b"{}"
    os.close(storage.held)


# --- places -----------------------------------------------------------------------------------------------------------


def test_a_ref_belongs_to_one_directory_wherever_it_is_moved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ref = place_ref(os.getpid(), tmp_path / "a")
    assert lives(ref)
    assert lives_in(ref, tmp_path / "a")
    subprocess.run(["cp", "-a", str(tmp_path / "a"), str(tmp_path / "b")], check=True)
    assert not belongs(ref, tmp_path / "b")
    assert not lives_in(ref, tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    assert lives_in(ref, tmp_path / "c")


def test_refs_of_earlier_versions_name_no_directory(tmp_path: Path) -> None:
    ref = ":".join(place_ref(os.getpid(), tmp_path).split(":")[:3])
    assert lives_in(ref, tmp_path)
    assert not lives_in("999999999:1:boot", tmp_path)


def test_a_directory_is_held_as_long_as_its_process_lives(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    code = "import sys; from pathlib import Path; from arbor_core.process.places import hold\nhold(Path(sys.argv[1])); "
    code += "print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        holder.kill()
    assert not is_held(tmp_path)


def test_where_a_directory_was_moved_to(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    handle = hold(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert moved_to(handle) == tmp_path / "b"
    (tmp_path / "b").rmdir()
    assert moved_to(handle) is None
    os.close(handle)
