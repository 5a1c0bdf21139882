"""What `check_trainer` asks of an attempt that follows one that was killed, and of resume points if the trainer writes
them: by convention it does so every `resume_seconds` then."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from arbor_core.jobdir import checkpoints
from arbor_core.types import CheckpointEvent, MetricsEvent, ResumePointWritten

from .job_directory import JobDirectory
from .reports import check_checkpoints, check_result, check_same

EVERY_STEP: Mapping[str, Any] = {"resume_seconds": 0}
"""Hyperparameters with which there is a resume point after each step that leaves no checkpoint."""


def check_killed(job: JobDirectory, whole: JobDirectory, *, points: bool) -> None:
    """Killed right after it has reported its last step, it makes again what came after the newest checkpoint or resume
    point, nothing more and nothing less, and ends where a run without interruption does.

    Args:
        points: There is to be a resume point after each step.
    """
    steps = [event.step for event in whole.events(MetricsEvent)]
    status = job.attempt(die_at=f"metrics.event:{len(steps)}")
    assert status == -signal.SIGKILL, f"to be killed at step {steps[-1]}, it ended with status {status}:\n{job.log}"
    died = job.events(MetricsEvent)
    saved = check_points(job, steps[:-1] if points else None)
    status = job.attempt()
    assert status == 0, f"after it was killed the worker ended with status {status}:\n{job.log}"
    again = job.events(MetricsEvent)
    made, expected = [event.step for event in again], [step for step in steps if step > saved]
    assert made == expected, f"killed when it could go on after step {saved}, it made the steps {made}"
    before = [event for event in died if event.step <= saved]
    check_same([*before, *again], whole.events(MetricsEvent), "it was killed")
    check_same([event for event in died if event.step > saved], again, "it was killed")
    check_checkpoints(job)
    check_result(job)
    check_none_left(job)


def check_points(job: JobDirectory, steps: Sequence[int] | None = None, most: int = 1) -> int:
    """Look at what an attempt that was killed has left: the newest resume point alone, and none of them as a model.

    Args:
        steps: After each of them there is to be a resume point, or a checkpoint where one is due anyway; None: nobody
            knows.
        most: Resume points that may be left: 2 where it may have been killed while it wrote one.

    Returns:
        The step after which the next attempt goes on; 0: it begins anew.
    """
    points = [event.step for event in job.events(ResumePointWritten)]
    models = [event.step for event in job.events(CheckpointEvent)]
    assert steps is None or sorted([*points, *models]) == list(steps), (
        f"with {dict(EVERY_STEP)} there are resume points of steps {points} and checkpoints of {models}; expected one "
        f"of each of {list(steps or ())}: after run.metrics ask a ResumeClock, and call run.write_resume_point"
    )
    kept = checkpoints.newest_first(job.files.resume_points)
    assert len(kept) <= most, f"of resume points only the newest is kept; there are {[path.name for path in kept]}"
    whole = [checkpoints.newest_whole(folder)[0] for folder in (job.files.resume_points, job.files.checkpoints)]
    return max((found.step for found in whole if found), default=0)


def check_none_left(job: JobDirectory) -> None:
    """The last checkpoint has taken the place of resume points."""
    left = [path.name for path in checkpoints.newest_first(job.files.resume_points)]
    assert not left, f"resume points outlive the last checkpoint: {left}"
