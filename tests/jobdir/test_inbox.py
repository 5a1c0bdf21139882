"""The inbox of a job that learns from rollouts: nothing acknowledged is lost, nothing half written is read."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arbor_core.jobdir import checkpoint_requests, groups, inbox, weights
from arbor_core.jobdir.groups import entry
from arbor_core.jobdir.inbox import Inbox, InboxDamagedError
from arbor_core.jobdir.layout import JobDir
from arbor_core.process.wakeup import wake
from arbor_core.types import CheckpointRequest, Group, Rollout
from arbor_core.worker import inbox_reader


def group(number: int, words: int = 50) -> Group:
    rollout = Rollout(reward=number / 2, prompt=b"\1\0\0\0", completion=b"abcd" * words, logprobs=b"\0\0\0\0" * words)
    return Group(id=number, rollouts=(rollout, rollout), version=number, metrics={"score": 1.5})


def record(number: int) -> bytes:
    return inbox.encoded(entry(group(number), number))


def ids(folder: Path, position: int = 0) -> list[int]:
    return [record.group.id for record in groups.read(folder, position)]


def test_what_was_appended_is_read_from_any_position(tmp_path: Path) -> None:
    box = Inbox(tmp_path, segment_bytes=1500)
    ends = [end for n in range(20) for end in box.append([entry(group(n), n)])]
    assert len(inbox.segments(tmp_path)) > 3
    for n, end in enumerate(ends):
        assert ids(tmp_path, end) == list(range(n + 1, 20))
    records = list(groups.read(tmp_path, 0))
    assert [record.group for record in records] == [group(n) for n in range(20)]
    assert [record.end for record in records] == ends
    assert [record.digest for record in records] == list(range(20))


def test_several_groups_in_one_append(tmp_path: Path) -> None:
    box = Inbox(tmp_path)
    ends = box.append([entry(group(n), n) for n in range(5)])
    assert [record.end for record in groups.read(tmp_path, 0)] == ends


@pytest.mark.parametrize("kept", range(1, 40, 7))
def test_a_torn_tail_is_not_read_and_cut_off(tmp_path: Path, kept: int) -> None:
    box = Inbox(tmp_path)
    (end,) = box.append([entry(group(0), 0)])
    box.close()
    with inbox.segments(tmp_path)[-1][1].open("ab") as file:
        file.write(record(1)[:kept])
    assert ids(tmp_path) == [0]
    again = Inbox(tmp_path)
    assert again.end == end
    again.append([entry(group(2), 2)])
    assert ids(tmp_path) == [0, 2]


def test_what_a_killed_writer_did_not_sync_is_on_the_disk_before_anybody_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    Inbox(tmp_path).append([entry(group(0), 0)])
    monkeypatch.setattr(os, "fsync", lambda to: synced.append(os.readlink(f"/proc/self/fd/{to}")) or real(to))
    Inbox(tmp_path)
    (segment,) = (path for _, path in inbox.segments(tmp_path))
    assert synced == [str(segment), str(tmp_path)]


def test_nothing_is_read_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failing disk takes back must not have been trained on."""
    box, reader = Inbox(tmp_path), inbox_reader.Feed(tmp_path)
    (end,) = box.append([entry(group(0), 0)])
    seen: list[tuple[list[int], int]] = []

    def fail(_: int) -> None:
        seen.append((ids(tmp_path), len(reader.take(0, 0))))
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            box.append([entry(group(1), 1)])
    assert seen == [([0, 1], 1)]
    box.append([entry(group(2), 2)])
    assert [found.group.id for found in reader.take(end, 0)] == [2]


def test_what_a_power_failure_left_beyond_the_mark_is_kept_where_it_is_whole(tmp_path: Path) -> None:
    box = Inbox(tmp_path)
    (first,) = box.append([entry(group(0), 0)])
    (second,) = box.append([entry(group(1), 1)])
    box.close()
    (tmp_path / inbox.SYNCED).write_bytes(inbox.POSITION.pack(first))  # the newer mark had not reached the disk
    zeros = record(2)[: inbox.HEADER_BYTES].ljust(500, b"\0")  # nor had the pages of the third record
    with inbox.segments(tmp_path)[-1][1].open("ab") as file:
        file.write(zeros)
    again = Inbox(tmp_path)
    assert (again.end, inbox.synced(tmp_path), ids(tmp_path)) == (second, second, [0, 1])


@pytest.mark.parametrize("at", [0, 9, 20])
def test_a_damaged_header_loses_nothing_that_follows(tmp_path: Path, at: int) -> None:
    box = Inbox(tmp_path)
    first, *_ = box.append([entry(group(n), n) for n in range(5)])
    box.close()
    path = inbox.segments(tmp_path)[0][1]
    content = bytearray(path.read_bytes())
    content[first + at] ^= 1
    path.write_bytes(content)
    with pytest.raises(InboxDamagedError, match=str(first)) as caught:
        Inbox(tmp_path)
    assert caught.value.position == first
    assert path.read_bytes() == content, "what can be saved is there"


def test_a_changed_record_is_found_and_named(tmp_path: Path) -> None:
    box = Inbox(tmp_path)
    first, _ = box.append([entry(group(n), n) for n in range(2)])
    path = inbox.segments(tmp_path)[0][1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InboxDamagedError) as caught:
        ids(tmp_path)
    assert caught.value.position == first
    assert str(first) in str(caught.value)


def test_a_full_disk_leaves_nothing_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Inbox(tmp_path)
    box.append([entry(group(0), 0)])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            box.append([entry(group(1), 1)])
    assert ids(tmp_path) == [0]
    box.append([entry(group(2), 2)])
    assert ids(tmp_path) == [0, 2]


@pytest.mark.parametrize("room", range(0, 1500, 173))
def test_of_several_groups_those_that_the_disk_took_stand(tmp_path: Path, room: int) -> None:
    """The trainer may have read a whole record before the writer knows that the next one did not fit."""
    box = Inbox(tmp_path)
    box.append([entry(group(0), 0)])

    class Filling:
        """The inbox's file on a disk that takes a part of what is written."""

        def __init__(self, file: Any) -> None:
            self.file, self.fileno = file, file.fileno

        def write(self, content: bytearray) -> int:
            return int(self.file.write(content[:room]))

    whole, box.log.file = box.log.file, Filling(box.log.file)  # type: ignore[assignment]
    several = [entry(group(n), n) for n in (1, 2, 3)]
    size = inbox.HEADER_BYTES + len(msgspec.msgpack.encode(group(1)))
    taken = min(3, room // size)
    if taken:
        assert len(box.append(several)) == taken
    else:
        with pytest.raises(OSError, match="only a part"):
            box.append(several)
    box.log.file = whole
    assert ids(tmp_path) == list(range(taken + 1))
    box.append([entry(group(9), 9)])
    assert ids(tmp_path) == [*range(taken + 1), 9]


def test_headers_tell_ids_and_digests_without_the_payloads(tmp_path: Path) -> None:
    Inbox(tmp_path).append([entry(group(n), 100 + n) for n in range(3)])
    found = [(number, digest) for _, _, number, digest in inbox.headers(inbox.segments(tmp_path)[0][1])]
    assert found == [(0, 100), (1, 101), (2, 102)]


def test_a_record_of_a_newer_writer_is_read(tmp_path: Path) -> None:
    """A field that this version does not know is passed over."""
    box = Inbox(tmp_path)
    plain = {**msgspec.to_builtins(group(4), builtin_types=(bytes,)), "colour": "green"}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plain), type=Group) == group(4)
    box.close()


def test_a_wakeup_ends_a_readers_wait(tmp_path: Path) -> None:
    box, reader = Inbox(tmp_path), inbox_reader.Feed(tmp_path)
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.extend(r.group.id for r in reader.take(0, 60.0)))
    waiting.start()
    box.append([entry(group(9), 9)])
    while waiting.is_alive():
        wake(tmp_path / "bell", "")
        waiting.join(0.05)
    assert got == [9]


def test_a_reader_does_not_wait_for_what_is_there(tmp_path: Path) -> None:
    Inbox(tmp_path).append([entry(group(1), 1)])
    reader = inbox_reader.Feed(tmp_path)
    assert [record.group.id for record in reader.take(0, 600.0)] == [1]
    assert reader.take(1 << 40, 0) == []


def test_published_versions_are_whole_and_few(tmp_path: Path) -> None:
    for version in range(weights.KEPT + 3):
        with weights.publishing(tmp_path / "weights", f"{version}-1") as folder:
            (folder / "weights.safetensors").write_bytes(b"w")
    with pytest.raises(RuntimeError), weights.publishing(tmp_path / "weights", "99-1"):
        raise RuntimeError
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == {f"{version}-1" for version in range(3, weights.KEPT + 3)}
    with weights.publishing(tmp_path / "weights", "1-2"):
        pass
    assert {path.name for path in (tmp_path / "weights").iterdir()} == names, "the newest is served until a newer comes"


def test_asked_checkpoints_are_answered_in_order(tmp_path: Path) -> None:
    job = JobDir(tmp_path)
    for seconds, name in enumerate(("best", "a.b-c_1"), 1):
        path = checkpoint_requests.ask(job, CheckpointRequest(name, {"score": 1}))
        os.utime(path, (seconds, seconds))  # a file system's clock may be coarse
    best, other = checkpoint_requests.asked(job)
    assert (best.name, other.name) == ("best", "a.b-c_1")
    checkpoint_requests.answered(job, best)
    assert checkpoint_requests.asked(job) == [other]


def test_a_request_that_takes_the_place_of_another_is_answered_too(tmp_path: Path) -> None:
    """A checkpoint takes its time: it answers the request that it was written for."""
    job = JobDir(tmp_path)
    checkpoint_requests.ask(job, CheckpointRequest("best", {"score": 1}))
    [first] = checkpoint_requests.asked(job)
    checkpoint_requests.ask(job, CheckpointRequest("best", {"score": 2}))
    checkpoint_requests.answered(job, first)
    [second] = checkpoint_requests.asked(job)
    assert second.metadata == {"score": 2}
    checkpoint_requests.answered(job, second)
    assert checkpoint_requests.asked(job) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/x", ".hidden", "x" * 65, "a\0b", "ü", "a\n"])
def test_a_checkpoints_name_becomes_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 64"):
        checkpoint_requests.ask(JobDir(tmp_path), CheckpointRequest(name))
    assert not (tmp_path / "asked").exists()
