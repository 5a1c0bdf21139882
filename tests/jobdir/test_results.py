"""The results of a job that executes commands: what was told stands, what was acknowledged is dropped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from crash import RESULTS, RESULTS_ALWAYS, marked

from arbor_core.jobdir import commands, results
from arbor_core.jobdir.results import Numbers, Results
from arbor_core.storage import synced_log
from arbor_core.storage.synced_log import Entry, LogDamagedError
from arbor_core.types import Command


def command(number: int) -> Command:
    payload = f"command {number}".encode()
    return Command(number, payload, commands.digest_of(payload), 0)


def answers(folder: Path, position: int = 0) -> dict[int, bytes]:
    return {place.number: results.payload(folder, place) for place in results.readable(folder, position)}


def starts(folder: Path) -> list[int]:
    return [start for start, _ in synced_log.segments(folder)]


def test_a_result_is_there_once_and_the_first_one_stands(tmp_path: Path) -> None:
    log = Results(tmp_path)
    assert log.answer(command(1), b"one")
    assert not log.answer(command(1), b"two")
    assert answers(tmp_path) == {1: b"one"}
    (place,) = results.readable(tmp_path, 0)
    assert place.digest == command(1).digest


def test_a_trainer_that_starts_again_sees_what_was_answered(tmp_path: Path) -> None:
    log = Results(tmp_path, segment_bytes=50)
    for number in (1, 2, 3, 5):
        log.answer(command(number), b"x" * 30)
    log.close()
    results.acknowledge(tmp_path, 2)
    third = next(place for place in results.readable(tmp_path, 0) if place.number == 3)
    results.drop(tmp_path, third.start)
    assert set(answers(tmp_path)) == {3, 5}
    again = Results(tmp_path, segment_bytes=50)
    assert [number in again.answered for number in range(1, 7)] == [True, True, True, False, True, False]
    assert not again.answer(command(1), b"other"), "an answer that was acknowledged and dropped is not given anew"
    assert again.differs(3, b"other")
    assert not again.differs(5, b"x" * 30)
    assert not again.differs(2, b"other"), "nobody knows any more"
    assert again.answer(command(4), b"four")
    assert answers(tmp_path)[4] == b"four"


def test_all_but_the_last_segment_is_dropped(tmp_path: Path) -> None:
    log = Results(tmp_path, segment_bytes=1)
    for number in range(1, 5):
        log.answer(command(number), b"x")
    before = starts(tmp_path)
    assert len(before) == 4
    results.drop(tmp_path, 0)
    assert starts(tmp_path) == before
    results.drop(tmp_path, log.end)
    assert starts(tmp_path) == before[-1:]
    log.answer(command(5), b"five")
    assert answers(tmp_path) == {4: b"x", 5: b"five"}
    assert answers(tmp_path, log.end) == {}


@pytest.mark.parametrize("kept", range(1, 40, 7))
def test_a_torn_tail_is_not_told_and_cut_off(tmp_path: Path, kept: int) -> None:
    log = Results(tmp_path)
    log.answer(command(1), b"one")
    log.close()
    (_, path) = synced_log.segments(tmp_path)[-1]
    with path.open("ab") as file:
        file.write(synced_log.encoded(Entry(2, 2, bytes(100)))[:kept])
    assert answers(tmp_path) == {1: b"one"}
    again = Results(tmp_path)
    again.answer(command(2), b"two")
    assert answers(tmp_path) == {1: b"one", 2: b"two"}


def test_nothing_is_told_before_it_and_its_mark_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Results(tmp_path)
    synced: list[str] = []

    def note(sync: str) -> None:
        real = getattr(os, sync)

        def call(handle: int) -> None:
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
            if sync == "fsync":
                assert answers(tmp_path) == {}
            real(handle)

        monkeypatch.setattr(os, sync, call)

    note("fsync")
    note("fdatasync")
    log.answer(command(1), b"one")
    assert synced == [log.log.path(0).name, synced_log.SYNCED]
    assert answers(tmp_path) == {1: b"one"}


def test_a_full_disk_leaves_nothing_and_the_command_unanswered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Results(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            log.answer(command(1), b"one")
    assert answers(tmp_path) == {}
    assert 1 not in log.answered
    assert log.answer(command(1), b"one")


def test_a_damaged_result_is_found(tmp_path: Path) -> None:
    log = Results(tmp_path)
    log.answer(command(1), b"one")
    log.answer(command(2), b"two")
    log.close()
    places = list(results.readable(tmp_path, 0))
    (_, path) = synced_log.segments(tmp_path)[0]
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1] + b"!")
    with pytest.raises(LogDamagedError, match=str(places[1].start)):
        results.payload(tmp_path, places[1])
    assert results.payload(tmp_path, places[0]) == b"one"
    content[places[1].start] ^= 1
    path.write_bytes(content)
    with pytest.raises(LogDamagedError, match="no record begins there"):
        list(results.readable(tmp_path, 0))
    with pytest.raises(LogDamagedError):
        Results(tmp_path)


@pytest.mark.parametrize("gone", ["a header", "the end of a segment"])
def test_a_result_that_is_gone_from_the_middle_is_missed(tmp_path: Path, gone: str) -> None:
    """Nobody may take it for one that was not written yet: it would be answered anew, and otherwise."""
    log = Results(tmp_path, segment_bytes=100)
    for number in range(1, 7):
        log.answer(command(number), b"x" * 40)
    log.close()
    (start, path), *others = synced_log.segments(tmp_path)
    assert len(others) > 1
    second = list(synced_log.places(tmp_path))[1]
    content = bytearray(path.read_bytes())
    content[second.start - start] ^= 1
    path.write_bytes(content if gone == "a header" else content[: second.start - start + 50])
    for find in (results.readable, synced_log.places, synced_log.read):
        with pytest.raises(LogDamagedError, match=f"position {second.start}"):
            list(find(tmp_path, 0))
    with pytest.raises(LogDamagedError):
        Results(tmp_path)


def test_two_attempts_cannot_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synced_log, "LOCK_SECONDS", 0.1)
    log = Results(tmp_path)
    with pytest.raises(OSError, match="another process"):
        Results(tmp_path)
    log.close()
    Results(tmp_path).close()


WRITING = """
import sys
from pathlib import Path
from arbor_core.jobdir import results
from arbor_core.types import Command

folder = Path(sys.argv[1])
log = results.Results(folder, segment_bytes=1)
for number in range(1, 5):
    log.answer(Command(number, b"", number, 0), f"{number} {sys.argv[2]}".encode())
results.acknowledge(folder, 2)
results.drop(folder, max(place.start for place in results.readable(folder, 0) if place.number == 3))
print("done")
"""


@pytest.mark.parametrize("point", marked(RESULTS_ALWAYS, RESULTS))
def test_whoever_dies_what_was_told_stands(tmp_path: Path, point: str) -> None:
    command = [sys.executable, "-c", WRITING, str(tmp_path)]
    died = subprocess.run([*command, "first"], env={**os.environ, "ARBOR_CRASH_AT": point}, check=False)
    assert died.returncode == -signal.SIGKILL
    told = answers(tmp_path)
    subprocess.run([*command, "again"], check=True, capture_output=True)
    now = answers(tmp_path)
    assert set(now) == {3, 4}
    assert {number: told[number] for number in told if number > 2}.items() <= now.items()
    assert results.acknowledged(tmp_path) == 2


def test_numbers_close_their_gaps() -> None:
    numbers = Numbers(2)
    numbers.add(4, 6, 1)
    assert (numbers.until, numbers.beyond) == (2, {4, 6})
    numbers.add(3)
    assert (numbers.until, numbers.beyond) == (4, {6})
    numbers.add_until(5)
    assert (numbers.until, numbers.beyond) == (6, set())
    numbers.add_until(1)
    assert [number in numbers for number in (0, 6, 7)] == [True, True, False]
