"""What a trainer of commands is handed: asked to finish or for a checkpoint only where nothing is left out."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from arbor_core.testing import JobDirectory
from arbor_core.worker import command_run
from arbor_core.worker.command_run import CommandWorkerRun
from arbor_core.worker.run import open_run


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return JobDirectory(tmp_path / "job", "mock_commands", (), "mock/tiny")


def opened(job: JobDirectory) -> CommandWorkerRun[Any]:
    """The run of a new attempt."""
    return open_run(job.prepare(), CommandWorkerRun)


def ended(run: CommandWorkerRun[Any]) -> None:
    """As the process of an attempt ends."""
    run.results.close()
    run.feed.socket.close()


def test_it_is_asked_to_finish_when_all_that_came_is_executed(job: JobDirectory) -> None:
    run = opened(job)
    job.command(1, b"1")
    job.command(2, b"2")
    job.ask("finish")
    assert run.desired() == "run"
    first, second = run.commands(0, 0)
    assert run.desired() == "run", "taken, and not executed"
    run.result(first, b"")
    assert run.desired() == "run"
    run.result(second, b"")
    assert run.desired() == "finish"
    job.command(3, b"3")
    assert run.desired() == "run", "it was sent before the client asked"
    job.ask("cancel")
    assert run.desired() == "cancel"
    ended(run)


def test_it_says_which_commands_are_not_executed_because_one_before_them_never_came(job: JobDirectory) -> None:
    run = opened(job)
    job.command(1, b"1")
    job.command(3, b"3")
    job.command(5, b"5")
    (first,) = run.commands(0, 0)
    run.result(first, b"")
    job.ask("finish")
    assert [run.desired(), run.desired()] == ["finish", "finish"]
    assert run.files.events.read_text().count("Command 2 never came: 2 after it are not executed (3, 5)") == 1
    ended(run)


def test_no_checkpoint_is_wanted_of_less_than_clients_were_told(job: JobDirectory) -> None:
    run = opened(job)
    job.command(1, b"1")
    job.command(2, b"2")
    for command in run.commands(0, 0):
        assert run.result(command, b"done")
    ended(run)
    job.request_checkpoint("best")
    again = opened(job)
    assert again.asked_checkpoints() == []
    first, second = again.commands(0, 0)
    assert not again.result(first, b"done")
    assert again.asked_checkpoints() == []
    assert not again.result(second, b"done")
    assert [request.name for request in again.asked_checkpoints()] == ["best"]
    assert [again.is_answered(number) for number in (1, 2, 3)] == [True, True, False]
    ended(again)


def test_other_ranks_write_nothing(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(job)
    job.command(1, b"1")
    (command,) = run.commands(0, 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    other = open_run(job.attempt_dir, CommandWorkerRun)
    assert not other.result(command, b"")
    job.ask("finish")
    assert other.desired() == "finish"
    assert job.results() == {}
    ended(run)


def test_a_result_waits_for_room_on_the_disk(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(job)
    job.command(1, b"1")
    (command,) = run.commands(0, 0)
    monkeypatch.setattr(command_run, "RETRY_SECONDS", 0)
    real, left = os.fsync, 2

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert run.result(command, b"done")
    assert left == -1
    assert job.results() == {1: b"done"}
    job.command(2, b"2")
    (second,) = run.commands(1, 0)
    left, run.room_seconds = 1000, -1.0
    with pytest.raises(OSError, match="No space left"):
        run.result(second, b"")
    assert not run.is_answered(2)
    ended(run)
