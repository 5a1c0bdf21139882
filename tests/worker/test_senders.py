"""Policies on their way out of a trainer: each rank takes part, and a sender need not write files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arbor_core import PolicyPublished, open_run
from arbor_core.testing import JobDirectory
from arbor_core.worker.rollout_run import RolloutWorkerRun

pytest.importorskip("arbor_mock")

SENDER = """
calls = []
class Sending:
    def __init__(self, run):
        self.rank = run.rank
    def send(self, version, weights):
        weights.write(None)
        calls.append((self.rank, version))
        return {"from": self.rank, "version": version}
"""


class Policy:
    """Weights that are spread over the ranks: each has to take part."""

    module = None

    def __init__(self) -> None:
        self.written: list[Path | None] = []

    def write(self, folder: Path | None) -> None:
        self.written.append(folder)
        if folder:
            (folder / "part").write_text("x")


def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sender: str = "") -> tuple[JobDirectory, list[Any]]:
    """A job with two ranks that have been opened."""
    job = JobDirectory(tmp_path / "job", "mock_grpo", (), "mock/tiny")
    job.sender = sender
    folder, found = job.prepare(), []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        found.append(open_run(folder, RolloutWorkerRun))
    return job, found


def told(job: JobDirectory) -> list[tuple[Any, ...]]:
    """What was said of each version."""
    return [(event.dir, event.version, event.handled, event.sent) for event in job.events(PolicyPublished)]


def test_files_are_written_by_rank_0_and_every_rank_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, (first, second) = runs(tmp_path, monkeypatch)
    policies = Policy(), Policy()
    for run, policy in zip((second, first), reversed(policies), strict=True):
        run.send_policy(3, 7, policy)
    assert (job.dir / "weights" / "3-1" / "part").read_text() == "x"
    assert policies[1].written == [None]
    assert told(job) == [("3-1", 3, 7, None)]


def test_a_sender_runs_in_every_rank_and_what_rank_0_returns_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sending.py").write_text(SENDER)
    monkeypatch.syspath_prepend(str(tmp_path))
    job, both = runs(tmp_path, monkeypatch, "sending:Sending")
    for version in (1, 2):
        for run in both:
            run.send_policy(version, 7, Policy())
    import sending  # type: ignore[import-not-found]

    assert sending.calls == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert not (job.dir / "weights").exists()
    assert told(job) == [(f"{version}-1", version, 7, {"from": 0, "version": version}) for version in (1, 2)]
