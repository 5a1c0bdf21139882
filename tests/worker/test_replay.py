"""`arbor replay`: a job's steps come out again as they were, or the first that does not is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from arbor_core.jobdir import groups, inbox
from arbor_core.testing import JobDirectory
from arbor_core.types import ArborError, Group, MetricsEvent, Rollout
from arbor_core.worker.replay import base_model, find_job, replay

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]} for n in range(12)
]


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    """A job of the mock trainer that has ended."""
    folder = tmp_path / "storage" / "jobs"
    folder.mkdir(parents=True)
    made = JobDirectory(folder / "one", "mock", ROWS, "mock/tiny", {"steps": 8, "step_seconds": 0.0})
    assert made.attempt() == 0, made.log
    return made


def told(job: JobDirectory) -> str:
    lines: list[str] = []
    replay(job.dir, lines.append)
    return "\n".join(lines)


def rewrite(job: JobDirectory, step: int, digest: str | None = None, **values: float) -> None:
    """Have the job's first attempt report something else of a step."""
    events = job.events(attempt=1)
    for event in events:
        if isinstance(event, MetricsEvent) and event.step == step:
            event.digest = digest or event.digest
            event.values |= values
    (job.attempt_dir / "events.jsonl").write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def test_every_step_comes_out_again(job: JobDirectory) -> None:
    before = sorted(path for path in job.dir.rglob("*") if path.is_file())
    assert "8 steps repeated: all losses are equal (no digests were reported)" in told(job)
    assert sorted(path for path in job.dir.rglob("*") if path.is_file()) == before
    assert [path.name for path in job.dir.parent.parent.iterdir()] == ["jobs"]


def test_the_first_step_that_differs_is_named(job: JobDirectory) -> None:
    rewrite(job, 7, digest="0" * 32)
    rewrite(job, 5, digest="f" * 32)
    with pytest.raises(ArborError, match="step 5 came out otherwise: its loss is equal"):
        told(job)


def test_another_loss_is_named(job: JobDirectory) -> None:
    rewrite(job, 3, train_loss=7.25)
    with pytest.raises(ArborError, match="step 3 came out otherwise: its loss was 7.25"):
        told(job)


def test_steps_that_are_not_made_again(job: JobDirectory) -> None:
    papers = json.loads((job.dir / "job.json").read_text())
    papers["config"]["steps"] = 5
    (job.dir / "job.json").write_text(json.dumps(papers))
    with pytest.raises(ArborError, match="came out otherwise|only 5 of 8"):
        told(job)


def test_nothing_to_repeat(tmp_path: Path) -> None:
    made = JobDirectory(tmp_path / "jobs" / "none", "mock", ROWS, "mock/tiny", {"steps": 2})
    with pytest.raises(ArborError, match="no step to repeat"):
        told(made)


def test_the_command(job: JobDirectory) -> None:
    storage = str(job.dir.parent.parent)
    command = [sys.executable, "-m", "arbor_core", "replay", job.dir.name, "--storage", storage]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "8 steps repeated" in done.stdout) == (0, True), done.stderr
    lost = subprocess.run([*command[:4], "ftjob-none", *command[5:]], capture_output=True, text=True)
    assert lost.returncode != 0
    assert lost.stderr.startswith("arbor: there is no job 'ftjob-none'")


def test_a_job_is_found_by_id_or_by_directory(job: JobDirectory) -> None:
    assert find_job(job.dir.name, job.dir.parent.parent) == job.dir
    assert find_job(str(job.dir), Path("/nowhere")) == job.dir


# --- what was learned from rollouts -----------------------------------------------------------------------------------


@pytest.fixture
def learned(tmp_path: Path) -> JobDirectory:
    """A job of the trainer mock_grpo that has made three steps, of two groups each; one group was too old."""
    folder = tmp_path / "storage" / "jobs"
    folder.mkdir(parents=True)
    values = {"num_generations": 2, "groups_per_step": 2, "max_steps": 3, "max_group_age": 1}
    made = JobDirectory(folder / "one", "mock_grpo", (), "mock/tiny", values)
    made.send(*(group(number, version) for number, version in enumerate((0, 0, 1, 1, 0, 2, 2))))
    assert made.attempt() == 0, made.log
    assert len(made.events(MetricsEvent)) == 3
    return made


def group(number: int, version: int) -> Group:
    said = [{"role": "user", "content": f"say {number}"}]
    rollouts = (
        Rollout(trajectory=n, reward=float(n), messages=said, answer={"role": "assistant", "content": str(n)})
        for n in range(2)
    )
    return Group(id=number, rollouts=tuple(rollouts), version=version)


def test_steps_of_rollouts_come_out_again(learned: JobDirectory) -> None:
    assert "3 steps repeated: all losses are equal and the digests of the parameters after 3 of them" in told(learned)


def test_a_damaged_group_is_found_and_its_step_is_named(learned: JobDirectory) -> None:
    (path,) = (path for _, path in inbox.segments(learned.dir / "inbox"))
    third = list(groups.read(learned.dir / "inbox", 0))[2]
    content = bytearray(path.read_bytes())
    content[third.end - 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArborError, match=rf"damaged at position {third.start}.*step 2 was trained on it"):
        told(learned)


def test_a_group_that_was_exchanged_is_found_whatever_its_checksum(learned: JobDirectory) -> None:
    folder = learned.dir / "inbox"
    records = [record.group for record in groups.read(folder, 0)]
    records[5].rollouts[1].reward = 9.0
    (path,) = (path for _, path in inbox.segments(folder))
    path.unlink()
    box = inbox.Inbox(folder)
    box.append([groups.entry(one, one.id) for one in records])
    box.close()
    with pytest.raises(ArborError, match=r"\(batch 5\) is not the one that step 3 was trained on"):
        told(learned)


def test_groups_that_are_gone_are_missed(learned: JobDirectory) -> None:
    folder = learned.dir / "inbox"
    last = list(groups.read(folder, 0))[-1]
    (path,) = (path for _, path in inbox.segments(folder))
    os.truncate(path, last.start)
    with pytest.raises(ArborError, match=f"no group at position {last.start}, on which step 3 was trained"):
        told(learned)


def test_a_base_model_that_has_moved_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    here, gone = str(tmp_path / "models" / "tiny"), str(tmp_path / "gone" / "tiny")
    assert base_model("organization/name", "organization/name", ()) == "organization/name"
    assert base_model(here, "tiny", ()) == here
    assert base_model(gone, "tiny", [tmp_path / "elsewhere", tmp_path / "models"]) == here
    with pytest.raises(ArborError, match="with --models DIR"):
        base_model(gone, "tiny", [tmp_path])
