"""Logs, small files, checkpoints, wake-up sockets."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from arbor_core import MetricsEvent
from arbor_core.jobdir import checkpoints
from arbor_core.process.wakeup import WakeupSocket, wake
from arbor_core.storage.atomic import replace
from arbor_core.storage.event_log import EventLog, tail


def steps(path: Path, offset: int = 0) -> list[int]:
    return [event.step for _, event in tail(path, offset) if isinstance(event, MetricsEvent)]


def metrics(step: int) -> MetricsEvent:
    return MetricsEvent(step=step, total_steps=9, values={})


def test_what_is_appended_is_read_back_from_any_offset(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(5):
        log.append(metrics(step), durable=step == 4)
    offsets = [offset for offset, _ in tail(log.path)]
    assert steps(log.path) == [0, 1, 2, 3, 4]
    assert steps(log.path, offsets[2]) == [3, 4]
    assert steps(log.path, offsets[-1]) == []
    assert steps(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"type":"met', b"{", b'{"type":"metrics","step":9}', b"x" * (3 << 20)])
def test_a_torn_tail_is_neither_read_nor_kept(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    EventLog(path).append(metrics(1))
    with path.open("ab") as file:
        file.write(torn)
    assert steps(path) == [1]
    EventLog(path).append(metrics(2))
    assert steps(path) == [1, 2]


def test_a_log_that_is_all_torn_starts_again(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"{")
    EventLog(path).append(metrics(1))
    assert steps(path) == [1]


def test_a_whole_line_that_is_no_record_is_an_error(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"nonsense\n")
    with pytest.raises(msgspec.DecodeError):
        steps(path)


def test_replace_leaves_no_part_behind(tmp_path):
    replace(tmp_path / "desired", b"run")
    replace(tmp_path / "desired", b"cancel")
    assert [path.name for path in tmp_path.iterdir()] == ["desired"]
    assert (tmp_path / "desired").read_text() == "cancel"


def write_checkpoint(root: Path, step: int, attempt: int, text: str = "weights") -> Path:
    folder = root / f"{step}-{attempt}"
    with checkpoints.writing(folder, step, attempt, {"train_loss": 0.5}) as temporary:
        (temporary / "model.bin").write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "more.bin").write_text(text)
    return folder


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for step, attempt in [(2, 1), (10, 1), (10, 2), (9, 3)]:
        write_checkpoint(tmp_path, step, attempt)
    found, faults = checkpoints.newest_whole(tmp_path)
    assert found and found.dir.name == "10-2" and found.step == 10 and found.metrics == {"train_loss": 0.5}
    assert faults == []


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match="full"), checkpoints.writing(tmp_path / "3-1", 3, 1, {}):
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["change", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    write_checkpoint(tmp_path, 1, 1)
    broken = write_checkpoint(tmp_path, 2, 1)
    if damage == "change":
        (broken / "model.bin").write_text("weightz")
    elif damage == "remove":
        (broken / "sub" / "more.bin").unlink()
    else:
        (broken / "manifest.json").unlink()
    found, faults = checkpoints.newest_whole(tmp_path)
    assert found and found.dir.name == "1-1"
    assert len(faults) == 1 and "2-1 is not used" in faults[0].message
    assert faults[0].dir == "2-1"


@pytest.mark.parametrize("depth", [0, 8])
async def test_a_wakeup_arrives_however_deep_its_folder_is(tmp_path, depth):
    folder = tmp_path.joinpath(*["a-folder-of-some-length"] * depth)
    folder.mkdir(parents=True, exist_ok=True)
    woken = asyncio.Queue()
    listener = WakeupSocket(folder / "bell", woken.put_nowait)
    wake(folder / "bell", "ftjob-1")
    assert await asyncio.wait_for(woken.get(), 120) == "ftjob-1"
    listener.close()
    wake(folder / "bell", "ftjob-1")  # nobody listens: nothing happens
    wake(None, "ftjob-1")
    assert not (folder / "bell").exists()
