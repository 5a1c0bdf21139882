"""The best checkpoint by validation loss, and training that ends when nothing gets better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from arbor_sft.selection import Selection
from sft_jobs import FULL, Job, chat, until, write_rows

from arbor_core import CheckpointEvent, ErrorEvent, MessageEvent, MetricsEvent, ResultEvent
from arbor_core.jobdir.samples import newest_first

ROWS = [chat(f"q{n}", f"a{n}") for n in range(12)]
OTHERS = [chat(f"z{n}", "".join(chr(97 + (n * k) % 26) for k in range(1, 12))) for n in range(10)]
"""Of which learning the rows by heart says nothing: the loss falls at first, and rises then."""


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> Any:
    rows, others = write_rows(tmp_path / "rows.jsonl", ROWS), write_rows(tmp_path / "others.jsonl", OTHERS)

    def make(name: str = "job", valid: bool = True, **more: Any) -> Job:
        settings = {**FULL, "n_epochs": 12, "lr_scheduler_type": "constant", "learning_rate": 1e-2, **more}
        return Job(tmp_path / name, tiny, rows, others if valid else None, settings)

    return make


def named(made: Job) -> list[int]:
    """The steps whose checkpoint was called the best, in all attempts."""
    events = [e for n in range(1, made.attempts + 1) for e in made.events(CheckpointEvent, n) if e.name == "best"]
    return [event.step for event in events]


def losses(made: Job) -> dict[int, float]:
    events = [event for n in range(1, made.attempts + 1) for event in made.events(MetricsEvent, n)]
    return {event.step: event.values["valid_loss"] for event in events if "valid_loss" in event.values}


def test_the_best_checkpoint_is_named_and_kept(job: Any) -> None:
    made = job(keep_checkpoints=1).run()
    found = losses(made)
    best = min(found, key=found.__getitem__)
    assert best < max(found), "the case shows nothing"
    assert named(made)[-1] == best
    assert (made.dir / "checkpoints" / "named" / "best").resolve().name == f"{best}-1"
    assert {path.name for path in (made.dir / "checkpoints").glob("*-*")} == {f"{best}-1", "36-1"}
    assert made.event(ResultEvent).step == 36


def test_training_ends_when_nothing_gets_better(job: Any) -> None:
    whole, ended = job("whole").run(), job("ended", early_stopping_patience=2).run()
    found = losses(whole)
    steps = sorted(found)
    lowest, in_vain, last = float("inf"), 0, steps[-1]
    for step in steps:
        lowest, in_vain = (found[step], 0) if found[step] < lowest else (lowest, in_vain + 1)
        if in_vain == 2:
            last = step
            break
    assert last < steps[-1], "the case shows nothing"
    assert [event.step for event in ended.events(MetricsEvent)] == list(range(1, last + 1))
    assert ended.event(ResultEvent).step == last
    assert ended.event(ResultEvent).trained_tokens == whole.event(ResultEvent).trained_tokens * last // 36
    assert any("2 evaluations in a row" in event.message for event in ended.events(MessageEvent))
    assert ended.digests() == {step: digest for step, digest in whole.digests().items() if step <= last}
    again = ended.run()  # the attempt before may have lost its last word
    assert again.events(MetricsEvent) == []
    assert again.event(ResultEvent).step == last


def test_what_was_best_is_known_after_an_interruption(job: Any) -> None:
    whole, killed = job("whole").run(), job("killed", resume_seconds=0)
    process = killed.start()
    until(process, killed, MetricsEvent, 20)
    process.kill()
    killed.run()
    assert killed.events(MetricsEvent)[0].step > 1
    assert losses(killed) == losses(whole)
    assert named(killed)[-1] == named(whole)[-1]


def test_patience_needs_a_validation_file(job: Any) -> None:
    made = job(valid=False, early_stopping_patience=1)
    assert made.attempt() == 1
    assert made.event(ErrorEvent).code == "invalid_hyperparameters"


def test_equal_losses_are_in_vain() -> None:
    found = Selection()
    for step, loss in enumerate((3.0, 2.0, 2.0, 2.5), 1):
        assert not found.ends(2)
        found.note(step, loss, saved=step != 2)
    assert found.ends(2)
    assert not found.ends(None)
    assert (found.lowest, found.best, found.best_step) == (2.0, 2.0, 3)


def test_probes_are_answered_by_the_best_checkpoint_and_the_result(job: Any) -> None:
    made = job(probes=["q1", "what?"], keep_checkpoints=1).run()
    plain = job("plain").run()
    assert made.digests() == plain.digests(), "training went on as without them"
    groups = {group.position: group for _, group in newest_first(made.dir / "samples")}
    labels = [(group.label, group.step) for _, group in sorted(groups.items())]
    assert labels == [("probe:best", step) for step in named(made)] + [("probe:result", 36)]
    assert all(group.prompts == ("q1", "what?") for group in groups.values())
    last = max(groups.values(), key=lambda group: group.step)
    assert last.rollouts[0].completion == "a1"
