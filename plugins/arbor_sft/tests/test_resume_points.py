"""A trainer that is killed anywhere goes on from its newest resume point, and is as it would have been."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from sft_jobs import Job, chat, until, write_rows

from arbor_core import CheckpointEvent, MetricsEvent
from arbor_core.jobdir import checkpoints

ROWS = [chat("q" * (n % 9 + 1), "a" * (n % 5 + 1)) for n in range(48)]
SETTINGS = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "learning_rate": 1e-2,
    "batch_size": 4,
    "n_epochs": 2,
    "micro_batch_size": 2,
    "checkpoint_steps": 100,
}


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> Any:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)

    def make(name: str, **more: Any) -> Job:
        return Job(tmp_path / name, tiny, rows, None, {**SETTINGS, **more})

    return make


def test_killed_at_random_places(job: Any) -> None:
    """Its first epoch is not over, so that there is no checkpoint yet."""
    whole, killed = job("whole", resume_seconds=None).run(), job("killed", resume_seconds=0)
    assert not (whole.dir / "resume").exists()
    draw, began = random.Random(0), []
    for _ in range(3):
        process = killed.start()
        until(process, killed, MetricsEvent, draw.randint(1, 6))
        process.kill()
        began.append(killed.events(MetricsEvent)[0].step)
    killed.run()
    began.append(killed.events(MetricsEvent)[0].step)
    wanted = whole.digests()
    assert len(set(wanted.values())) == 24
    for attempt in range(1, 5):
        found = killed.digests(attempt)
        assert found == {step: wanted[step] for step in found}
    assert killed.digest() == whole.digest()
    assert [event.step for event in killed.events(CheckpointEvent)] == [24]
    ends = [max(killed.digests(attempt)) for attempt in range(1, 4)]
    assert all(begin in (end, end + 1) for begin, end in zip(began[1:], ends, strict=True))  # one step is lost at most
    assert checkpoints.newest_first(killed.dir / "resume") == []
