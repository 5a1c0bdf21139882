"""Full disks, with the real trainer. A full disk is a small file system in memory, which only root can mount."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import mounted
from sft_jobs import FULL, Job, Worker, chat, polls, until, write_rows

from arbor_core import CheckpointEvent, MetricsEvent

LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "learning_rate": 1e-2, "batch_size": 4, "n_epochs": 1}
STEPS = {"n_epochs": 10, "max_steps": 40, "checkpoint_steps": 20}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MB."""
    with mounted(tmp_path / "disk", 100) as folder:
        yield folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", [chat(f"say {n}", f"{n} it is") for n in range(16)])


def fill(folder: Path, leave: int) -> Path:
    """Use up all but some bytes; removing the file that is returned gives them back."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while (free := shutil.disk_usage(folder).free) > leave:
            try:
                file.write(bytes(min(free - leave, 1 << 16)))
            except OSError:
                break
    return ballast


@pytest.mark.parametrize("kind", [pytest.param(FULL, id="full"), pytest.param(LORA, id="lora")])
@pytest.mark.parametrize("leave", [0, 400_000])
def test_row_95_a_checkpoint_waits_for_room_and_nothing_is_lost(
    small_disk: Path, tmp_path: Path, tiny: Path, data: Path, kind: dict[str, Any], leave: int
) -> None:
    settings = {**kind, **STEPS}
    job = Job(small_disk / "job", tiny, data, None, settings)
    process = job.start()
    until(process, job, MetricsEvent, 1)
    ballast = fill(small_disk, leave)
    wait_for_tries(job, process, 2)
    assert not job.events(CheckpointEvent)
    ballast.unlink()
    assert process.wait() == 0, job.log()
    assert [event.step for event in job.events(CheckpointEvent)] == [20, 40]
    assert not list((job.dir / "checkpoints").glob("*.tmp"))
    twin = Job(tmp_path / "twin", tiny, data, None, settings).run()
    assert list(twin.digests()) == list(range(1, 41))
    assert job.digests() == twin.digests()
    assert job.digest() == twin.digest()
    names = [sorted(path.name for path in made.result().iterdir()) for made in (job, twin)]
    assert names[0] == names[1]
    assert "training_args.bin" not in names[0]


def wait_for_tries(job: Job, process: Worker, count: int) -> None:
    """Wait until so many times a checkpoint was begun and given up again."""
    folder = job.dir / "checkpoints"
    seen: set[int] = set()
    for _ in polls(60):
        assert not process.ended(), job.log()
        if folder.exists() and not list(folder.iterdir()):
            seen.add(folder.stat().st_mtime_ns)
        if len(seen) >= count:
            return
    raise AssertionError(f"{len(seen)} checkpoints were given up within 60 s: {job.log()}")
