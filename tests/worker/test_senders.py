"""Policies on their way out of a trainer: each rank takes part, and a sender need not write files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from arbor_core import PolicyPublished, open_run
from arbor_core.testing import JobDirectory
from arbor_core.worker.command_run import CommandWorkerRun
from arbor_core.worker.live_run import LiveWorkerRun
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


Kind = tuple[str, type[LiveWorkerRun[Any]], tuple[int, ...]]


@pytest.fixture(params=[("mock_grpo", RolloutWorkerRun, (7,)), ("mock_commands", CommandWorkerRun, ())])
def kind(request: pytest.FixtureRequest) -> Kind:
    """A trainer, what it is handed, and how many groups it has handled when it publishes."""
    return request.param  # type: ignore[no-any-return]


def runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, sender: str = ""
) -> tuple[JobDirectory, list[Any]]:
    """A job with two ranks that have been opened."""
    job = JobDirectory(tmp_path / "job", kind[0], (), "mock/tiny")
    job.sender = sender
    folder, found = job.prepare(), []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        found.append(open_run(folder, kind[1]))
    return job, found


def told(job: JobDirectory) -> list[tuple[Any, ...]]:
    """What was said of each version."""
    return [(event.dir, event.version, event.handled, event.sent) for event in job.events(PolicyPublished)]


def test_files_are_written_by_rank_0_and_every_rank_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    job, (first, second) = runs(tmp_path, monkeypatch, kind)
    policies = Policy(), Policy()
    for run, policy in zip((second, first), reversed(policies), strict=True):
        run.send_policy(3, *kind[2], policy)
    assert (job.dir / "weights" / "3-1" / "part").read_text() == "x"
    assert policies[1].written == [None]
    assert told(job) == [("3-1", 3, sum(kind[2]), None)]


def test_a_sender_runs_in_every_rank_and_what_rank_0_returns_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    (tmp_path / "sending.py").write_text(SENDER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sending", raising=False)
    job, both = runs(tmp_path, monkeypatch, kind, "sending:Sending")
    for version in (1, 2):
        for run in both:
            run.send_policy(version, *kind[2], Policy())
    import sending  # type: ignore[import-not-found]

    assert sending.calls == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert not (job.dir / "weights").exists()
    assert told(job) == [(f"{version}-1", version, sum(kind[2]), {"from": 0, "version": version}) for version in (1, 2)]
