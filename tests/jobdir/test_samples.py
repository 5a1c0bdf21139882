"""Sampled rollouts: what is kept of a group, how long, and how it is read again."""

from __future__ import annotations

from array import array
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arbor_core.jobdir import samples
from arbor_core.jobdir.samples import FORMAT, MARK, Place, SampleLog, find, newest_first, sampled
from arbor_core.storage.segment_log import SegmentLog, segments
from arbor_core.testing import JobDirectory
from arbor_core.types import Group, MessageEvent, Record, Rollout, Scored
from arbor_core.worker.rollout_run import RolloutWorkerRun
from arbor_core.worker.run import open_run

QUESTION = [{"role": "user", "content": "why?"}]


def tokens(text: str) -> bytes:
    return array("i", list(text.encode())).tobytes()


def text(ids: list[int]) -> str:
    return bytes(ids).decode()


def record(position: int, *rollouts: Rollout, **more: Any) -> Record:
    group = Group(id=position // 100, rollouts=rollouts or (rollout("a"), rollout("b")), version=3, **more)
    return Record(position, position + 100, 0, 0, group)


def rollout(said: str, reward: float | None = 1.0, **more: Any) -> Rollout:
    return Rollout(prompt=tokens("why?"), completion=tokens(said), reward=reward, **more)


def written(folder: Path, *positions: int, **options: Any) -> SampleLog:
    log = SampleLog(folder, **options)
    for position in positions:
        log.add(sampled(record(position), step=position // 100 + 1, decode=text))
    log.close()
    return log


def positions(folder: Path) -> list[int]:
    return [group.position for place, group in newest_first(folder) if place.rollout == 0]


def test_tokens_are_shown_as_text_and_counted() -> None:
    found = sampled(record(200, label="question"), 7, [Scored(0.5), Scored(-0.5)], text)
    assert found.prompts == ("why?",)
    assert [(one.prompt, one.completion, one.advantage) for one in found.rollouts] == [(0, "a", 0.5), (0, "b", -0.5)]
    assert {(one.prompt_tokens, one.completion_tokens, one.reward, one.cut) for one in found.rollouts} == {
        (4, 1, 1.0, False)
    }
    assert (found.position, found.step, found.error, found.version, found.id, found.label, found.size) == (
        200,
        7,
        None,
        3,
        2,
        "question",
        2,
    )


def test_messages_are_kept_and_plain_answers_shown_as_text() -> None:
    calls: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    answers = ({"role": "assistant", "content": "so"}, calls)
    rollouts = (Rollout(messages=QUESTION, answer=answer, advantage=0.25, truncated=True) for answer in answers)
    found = sampled(record(0, *rollouts), 1, [Scored(None, 9, 2)])
    assert found.prompts == (QUESTION,)
    assert [one.completion for one in found.rollouts] == ["so", calls]
    first, second = found.rollouts
    assert (first.advantage, first.prompt_tokens, first.completion_tokens, first.truncated) == (0.25, 9, 2, True)
    assert (second.prompt_tokens, second.completion_tokens) == (None, None)


@pytest.mark.parametrize("raw", [array("i", [-1, 5]).tobytes(), array("i", [300, 5]).tobytes() + b"\1\2"])
def test_what_no_tokenizer_knows_is_shown_as_numbers(raw: bytes) -> None:
    found = sampled(record(0, Rollout(prompt=raw, completion=b"")), error="no tokens", decode=text)
    assert (found.prompts[0], found.rollouts[0].completion) in {("-1 5", ""), ("300 5", "")}
    assert (found.step, found.error) == (0, "no tokens")


@pytest.mark.parametrize(
    "long",
    [
        rollout("x" * 5_000 + "y" * 5_000),
        rollout("x" * 30_000 + "y" * 30_000),
        Rollout(messages=QUESTION, answer={"role": "assistant", "content": "x" * 5_000 + "y" * 5_000}),
        Rollout(messages=QUESTION, answer={"content": "x", "tool_calls": [{"arguments": "y" * 9_000}, "y" * 9]}),
    ],
)
def test_long_texts_lose_their_middle(long: Rollout) -> None:
    (found,) = sampled(record(0, long), 1, decode=text).rollouts
    assert isinstance(found.completion, str)
    assert found.cut
    assert MARK in found.completion
    assert len(found.completion) == samples.TEXT_CHARACTERS + len(MARK)
    assert "x" in found.completion[:16]
    assert "y" in found.completion[-12:]


def test_long_prompts_are_shown_as_their_json() -> None:
    (found,) = sampled(record(0, Rollout(messages=QUESTION * 1_000, answer={"content": "so"})), 1).prompts
    assert isinstance(found, str)
    assert found.startswith('[{"role":"user"')
    assert len(found) < 9_000


def test_of_a_large_group_not_all_is_kept() -> None:
    found = sampled(record(0, *(rollout(str(number) * 4_000) for number in range(1000))), 1, decode=text)
    assert found.size == 1000
    assert 10 < len(found.rollouts) < 40


def test_what_is_kept_of_many_short_rollouts_is_bounded_too() -> None:
    names = tuple(f"chatcmpl-{number}" for number in range(5_000))
    found = sampled(record(0, *(rollout("x", completions=names) for _ in range(16_384))), 1, decode=text)
    assert (found.size, len(found.rollouts)) == (16_384, 995)
    assert len(found.rollouts[0].completions) == samples.NAMES
    small = sampled(record(0, *(rollout("x") for _ in range(16_384))), 1, decode=text)
    assert len(msgspec.msgpack.encode(small)) < samples.SEGMENT_BYTES


def test_the_newest_group_is_first_and_its_rollouts_in_their_order(tmp_path: Path) -> None:
    written(tmp_path, 0, 100, 200, segment_bytes=1)
    found = [(group.position, group.rollouts[place.rollout].completion) for place, group in newest_first(tmp_path)]
    assert found == [(position, said) for position in (200, 100, 0) for said in "ab"]


def test_pages_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    written(tmp_path, *range(0, 2_000, 100), segment_bytes=500)
    assert len(segments(tmp_path)) > 3
    whole = [place for place, _ in newest_first(tmp_path)]
    assert len(set(whole)) == 40
    found: list[Place] = []
    while page := list(islice(newest_first(tmp_path, found[-1] if found else None), 3)):
        found += [place for place, _ in page]
        assert find(tmp_path, found[-1]) == found[-1]
    assert found == whole
    assert [group.position for _, group in newest_first(tmp_path, step=4)] == [300, 300]


def test_a_page_touches_no_older_segment(tmp_path: Path) -> None:
    written(tmp_path, *range(0, 1_000, 100), segment_bytes=1)
    (tmp_path / "8.log").unlink()
    (tmp_path / "8.log").mkdir()  # opening it fails
    assert [group.position for _, group in islice(newest_first(tmp_path), 2)] == [900, 900]
    assert [group.position for _, group in islice(newest_first(tmp_path, Place(7, 0, 1)), 2)] == [600, 600]
    with pytest.raises(IsADirectoryError):
        list(newest_first(tmp_path))


def test_places_where_nothing_stands(tmp_path: Path) -> None:
    assert find(tmp_path, Place(0, 0, 0)) is None
    written(tmp_path, *range(0, 1_000, 100), segment_bytes=1, max_segments=4)
    for wrong in (Place(9, 1, 0), Place(9, 0, 2), Place(10, 0, 0), Place(9, 1 << 40, 0)):
        assert find(tmp_path, wrong) is None
    removed = Place(2, 0, 1)
    assert find(tmp_path, removed) == removed
    assert list(newest_first(tmp_path, removed)) == []


def test_the_oldest_segments_are_removed(tmp_path: Path) -> None:
    written(tmp_path, *range(0, 1_000, 100), segment_bytes=1, max_segments=3)
    assert [number for number, _ in segments(tmp_path)] == [7, 8, 9]
    SegmentLog("samples", tmp_path).path(2).write_bytes(b"left by a process that was killed")
    written(tmp_path, 1_000, segment_bytes=1, max_segments=3)
    assert positions(tmp_path) == [1_000, 900, 800]


def test_groups_that_are_handled_again_are_passed_over(tmp_path: Path) -> None:
    """Also those that were removed since, and in whatever order they were written."""
    two: Any = {"segment_bytes": written(tmp_path / "one", 0).log.size + 50, "max_segments": 2}
    written(tmp_path, 100, 0, 200, 300, 500, 400, 600, 700, **two)
    assert positions(tmp_path) == [700, 600, 400, 500]
    again = SampleLog(tmp_path, **two)
    for position in range(0, 900, 100):
        again.add(sampled(record(position), error="something else"))
    assert positions(tmp_path) == [800, 700, 600]
    assert [group.error for _, group in newest_first(tmp_path)][2:] == [None] * 4


@pytest.mark.parametrize("kept", [1, FORMAT.header_bytes, FORMAT.header_bytes + 9])
def test_a_torn_tail_is_cut_off_and_written_again(tmp_path: Path, kept: int) -> None:
    end = written(tmp_path, 0, 100).log.size
    written(tmp_path, 200)
    path = tmp_path / "0.log"
    path.write_bytes(path.read_bytes()[: end + kept])
    assert positions(tmp_path) == [100, 0]
    written(tmp_path, 100, 200)
    assert positions(tmp_path) == [200, 100, 0]


def test_what_a_power_failure_left_as_zeros_is_cut_off(tmp_path: Path) -> None:
    end = written(tmp_path, 0).log.size
    written(tmp_path, 100)
    path = tmp_path / "0.log"
    raw = path.read_bytes()
    path.write_bytes(raw[: end + FORMAT.header_bytes] + bytes(len(raw) - end - FORMAT.header_bytes))
    assert positions(tmp_path) == [0]
    written(tmp_path, 100)
    assert positions(tmp_path) == [100, 0]


def test_a_damaged_record_is_passed_over(tmp_path: Path) -> None:
    start, end = (written(tmp_path, position).log.size for position in (0, 100))
    written(tmp_path, 200)
    path = tmp_path / "0.log"
    raw = bytearray(path.read_bytes())
    raw[(start + FORMAT.header_bytes + end) // 2] ^= 1
    path.write_bytes(raw)
    assert positions(tmp_path) == [200, 0]
    assert find(tmp_path, Place(0, start, 0)) is None


def test_a_full_disk_leaves_samples_out_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = JobDirectory(tmp_path / "job", "mock_grpo", [], "mock/tiny")
    run = open_run(job.prepare(), RolloutWorkerRun)
    run.report_samples(record(0), 1)
    with monkeypatch.context() as full:

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(SegmentLog, "append", refuse)
        run.report_samples(record(100), 2)
        run.report_samples(record(200), 3)
    run.report_samples(record(300), 4)
    assert positions(job.files.samples) == [300, 0]
    (warning,) = job.events(MessageEvent)
    assert "No space left on device" in warning.message


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    job = JobDirectory(tmp_path / "job", "mock_grpo", [], "mock/tiny")
    open_run(job.prepare(), RolloutWorkerRun).report_samples(record(0), 1)
    assert not job.files.samples.exists()
