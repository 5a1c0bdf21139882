"""Resume points: what a job goes on from, and nobody else sees."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from arbor_core.jobdir import checkpoints, resume_points
from arbor_core.process.resources import DiskFullError
from arbor_core.testing import JobDirectory
from arbor_core.types import CheckpointEvent, MetricsEvent, ResultEvent, ResumePointWritten
from arbor_core.worker.file_run import FileWorkerRun
from arbor_core.worker.run import open_run

STEPS = 6
SAVES = """
def write(folder):
    (folder / "weights").write_bytes(b"1234")


def train(run):
    last = run.last_checkpoint()
    for step in range(last.step + 1 if last else 1, 7):
        run.metrics(step, 6, train_loss=1 / step)
        if step in (3, 6):
            run.write_checkpoint(step, write)
        else:
            run.write_resume_point(step, write)
    run.finish(run.last_checkpoint(), 1)
"""


@pytest.fixture
def job(tmp_path: Path, chat_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> JobDirectory:
    """It writes a checkpoint at steps 3 and 6, and a resume point at every other."""
    (tmp_path / "saves.py").write_text(SAVES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    made = JobDirectory(tmp_path / "job", "mock", chat_rows, "mock/tiny")
    made.entry = "saves:train"
    return made


def run_of(job: JobDirectory) -> FileWorkerRun[Any]:
    return open_run(job.prepare(), FileWorkerRun)


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1234")


def points(job: JobDirectory) -> set[str]:
    return {path.name for path in checkpoints.newest_first(job.files.resume_points)}


@pytest.mark.parametrize(
    ("point", "died_after", "goes_on_at"),
    [("resume_point.renamed", 1, 2), ("saved.event", 1, 2), ("saved.event:3", 4, 5), ("checkpoint.written:4", 4, 4)],
)
def test_an_attempt_goes_on_from_the_newest_resume_point(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, point: str, died_after: int, goes_on_at: int
) -> None:
    """It dies right after one, or while one is written."""
    with monkeypatch.context() as dying:
        dying.setenv("ARBOR_CRASH_AT", point)
        assert job.attempt() == -signal.SIGKILL
    assert job.events(MetricsEvent)[-1].step == died_after
    assert job.attempt() == 0
    assert [event.step for event in job.events(MetricsEvent)] == list(range(goes_on_at, STEPS + 1))
    assert job.events(ResultEvent)[0].step == STEPS
    assert points(job) == set()
    assert {path.name.partition("-")[0] for path in checkpoints.newest_first(job.files.checkpoints)} == {"3", "6"}


def test_only_the_newest_is_kept_until_there_is_a_checkpoint(job: JobDirectory) -> None:
    run = run_of(job)
    for step in (1, 2):
        assert run.write_resume_point(step, fill, train_loss=float("nan"), valid_loss=0.5)
        assert points(job) == {f"{step}-1"}
    last = run.last_checkpoint()
    assert last
    assert (last.step, last.metrics, last.resume_only) == (2, {"valid_loss": 0.5}, True)
    assert not job.events(CheckpointEvent)
    assert [event.step for event in job.events(ResumePointWritten)] == [1, 2]
    run.write_checkpoint(2, fill)
    last = run.last_checkpoint()
    assert last
    assert (last.step, last.resume_only) == (2, False)
    assert points(job) == set()


def test_a_damaged_one_is_passed_over(job: JobDirectory) -> None:
    run = run_of(job)
    run.write_checkpoint(1, fill)
    run.write_resume_point(2, fill)
    (job.files.resume_points / "2-1" / "weights").write_bytes(b"12")
    last = run.last_checkpoint()
    assert last
    assert (last.step, last.resume_only) == (1, False)


def test_without_room_the_one_before_stays(job: JobDirectory) -> None:
    run = run_of(job)
    run.write_resume_point(1, fill)

    def full(folder: Path) -> None:
        raise DiskFullError(28, "no room")

    assert run.write_resume_point(2, full) is False
    assert points(job) == {"1-1"}


def test_none_is_left_when_the_job_has_ended(job: JobDirectory) -> None:
    run_of(job).write_resume_point(1, fill)
    resume_points.forget(job.files.resume_points)
    assert not job.files.resume_points.exists()
    shutil.rmtree(job.dir)
    resume_points.forget(job.files.resume_points)
