"""What a process that was killed leaves in a job directory is found and swept."""

from __future__ import annotations

from pathlib import Path

from arbor_core import CheckpointDiscarded, CheckpointEvent
from arbor_core.jobdir import checkpoints
from arbor_core.jobdir.cleanup import reconciled, sweep
from arbor_core.jobdir.layout import JobDir
from arbor_core.storage.event_log import EventLog


def committed(job_dir: Path, step: int, attempt: int) -> Path:
    folder = job_dir / "checkpoints" / f"{step}-{attempt}"
    with checkpoints.writing(folder, step, attempt, {"train_loss": 1.0}) as inside:
        (inside / "weights").write_bytes(b"1234")
    return folder


def test_row_93_checkpoints_without_an_event_are_found(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "attempts" / "2" / "events.jsonl")
    committed(tmp_path, 2, 1)
    for step in (4, 6, 8):
        committed(tmp_path, step, 2)
    log.append(CheckpointEvent(step=4, dir="4-2"))
    log.append(CheckpointDiscarded(dir="6-2"))
    [found] = reconciled(JobDir(tmp_path).attempt(2))
    assert isinstance(found, CheckpointEvent)
    assert (found.step, found.dir, found.metrics) == (8, "8-2", {"train_loss": 1.0})
    assert not (tmp_path / "checkpoints" / "6-2").exists(), "one that was discarded is removed"
    assert (tmp_path / "checkpoints" / "2-1").exists()


def test_what_a_killed_process_leaves_is_swept(tmp_path: Path) -> None:
    kept = [tmp_path / "job.json", tmp_path / "attempts/1/events.jsonl", tmp_path / "checkpoints/2-1/weights"]
    left = ["checkpoints/4-1.tmp/weights", "attempts/1/work/x", ".desired.7.tmp", "attempts/1/.keeper.9"]
    left += ["asked/.best.json.7.tmp", "attempts/1/.exit.json.7.tmp", "inbox/bell"]
    for path in (*kept, *(tmp_path / name for name in left)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    sweep(JobDir(tmp_path))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
