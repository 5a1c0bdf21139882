"""`arbor replay` of a job that learned: every step comes out again to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpo_jobs import QUICK, Background, Job, group, groups

from arbor_core import MetricsEvent
from arbor_core.worker.replay import replay

pytestmark = pytest.mark.ml


def test_every_step_of_a_job_that_was_paused_comes_out_again(tiny: Path, tmp_path: Path) -> None:
    """With all that a step may depend on: dropout, a reference, steps on the same batch, a group that is skipped."""
    storage = tmp_path / "storage" / "jobs"
    storage.mkdir(parents=True)
    keys = {**QUICK, "max_steps": 6, "num_iterations": 2, "max_group_age": 0, "beta": 0.05}
    made = Job(storage / "one", "grpo", [], str(tiny), keys)
    made.send(*groups(2))
    attempt = Background(made)
    attempt.until(MetricsEvent, 2)
    made.ask("pause")
    assert attempt.end() == 0
    made.ask("run")
    made.send(*(group(n, version=version) for n, version in enumerate((2, 0, 2, 4, 4))))
    made.must()
    assert [event.data["groups_skipped"] for event in made.events(MetricsEvent)] == [1, 1, 0, 0]
    assert len(set(made.digests().values())) == 6
    told: list[str] = []
    replay(made.dir, told.append)
    assert told[-1] == ("6 steps repeated: all losses are equal and the digests of the parameters after 6 of them")
