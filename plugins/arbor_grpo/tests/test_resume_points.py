"""A job that learns from rollouts goes on from its newest resume point."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from grpo_jobs import QUICK, Job, groups

from arbor_core.types import CheckpointEvent, MetricsEvent, ResultEvent

PATIENCE = 120


def killed_after(job: Job, steps: int) -> None:
    """An attempt that is killed when it has made so many steps."""
    process = job.start()
    try:
        end = time.monotonic() + PATIENCE
        while len(job.events(MetricsEvent)) < steps:
            assert process.poll() is None, job.log
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("more", [{}, pytest.param({"num_iterations": 2}, marks=pytest.mark.slow)], ids=str)
def test_killed_at_a_random_place(job: Any, more: dict[str, Any]) -> None:
    cycle = more.get("num_iterations", 1)
    steps = 6 * cycle
    keys = {"max_steps": steps, **QUICK, **more}
    whole, killed = job("whole", resume_seconds=None, **keys), job("killed", resume_seconds=0, **keys)
    whole.send(*groups(12))
    whole.must()
    cycles = random.Random(1).randint(2, 4)
    sent = 2 * (cycles + 1)  # it may be at the next cycle when it is killed, and never at its end
    killed.send(*groups(sent))
    killed_after(killed, cycle * cycles)
    done = max(killed.digests())
    killed.send(*groups(12 - sent, sent))
    killed.must()
    saved = (done - 1) // cycle * cycle  # a point is written where cycles meet, after the metrics of its step
    assert 0 < saved < killed.events(MetricsEvent)[0].step <= done + 1
    assert killed.digests() == whole.digests()
    assert [event.step for event in killed.events(CheckpointEvent)] == [steps]
    assert killed.events(ResultEvent)[0].step == steps


def test_a_checkpoint_is_named_where_there_is_only_a_resume_point(job: Any) -> None:
    """The one that the attempt went on from is no model: a whole checkpoint is written before it gets a name."""
    made = job("made", resume_seconds=0, **QUICK)
    made.send(*groups(4))
    killed_after(made, 2)
    made.request_checkpoint("best")
    made.ask("finish")
    made.must()
    named = [event for event in made.events(CheckpointEvent) if event.name == "best"]
    assert len(named) == 1
    assert made.events(ResultEvent)[0].step == named[0].step
