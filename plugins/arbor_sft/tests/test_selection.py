"""The best checkpoint by validation loss, and training that ends when nothing gets better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from arbor_sft.selection import Selection
from safetensors.torch import load_file, save_file
from sft_jobs import FULL, Job, chat, until, write_rows

from arbor_core import CheckpointEvent, ErrorEvent, MessageEvent, MetricsEvent, ResultEvent
from arbor_core.jobdir import checkpoints
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
    best = min(steps[: steps.index(last) + 1], key=found.__getitem__)
    assert best < last < steps[-1], "the case shows nothing"
    assert [event.step for event in ended.events(MetricsEvent)] == list(range(1, last + 1))
    assert (ended.event(ResultEvent).step, named(ended)[-1]) == (best, best)
    assert (ended.dir / "checkpoints" / "named" / "best").resolve() == ended.result()
    assert ended.event(ResultEvent).trained_tokens == whole.event(ResultEvent).trained_tokens * last // 36
    assert any("2 evaluations in a row" in event.message for event in ended.events(MessageEvent))
    assert ended.digests() == {step: digest for step, digest in whole.digests().items() if step <= last}
    again = ended.run()  # the attempt before may have lost its last word
    assert again.events(MetricsEvent) == []
    assert again.event(ResultEvent).step == best


def test_the_best_is_the_result_also_where_training_goes_to_its_end(job: Any) -> None:
    """With evaluations between checkpoints, of which the lowest gets a checkpoint: with few kept, it alone is left."""
    made = job(early_stopping_patience=100, checkpoint_steps=36, eval_steps=2, keep_checkpoints=1).run()
    found = losses(made)
    best = min(found, key=found.__getitem__)
    assert best < max(found) == 36, "the case shows nothing"
    result = made.event(ResultEvent)
    assert (result.step, result.dir, named(made)[-1]) == (best, f"{best}-1", best)
    assert {path.name for path in (made.dir / "checkpoints").glob("*-*")} == {f"{best}-1", "36-1"}
    assert any(f"the checkpoint of step {best}" in event.message for event in made.events(MessageEvent))
    saved = {event.step: event.metrics["valid_loss"] for event in made.events(CheckpointEvent)}
    lowest = [step for step, loss in found.items() if all(loss < found[other] for other in found if other < step)]
    assert saved == {step: found[step] for step in [*lowest, 36]}
    further = Job(made.dir.parent / "further", made.result(), made.validation_file, None, {**FULL, "batch_size": 10})
    assert further.run().curve()[0] == pytest.approx(found[best], rel=1e-5)


def test_the_result_is_what_is_opened(job: Any) -> None:
    """An attempt that finds training over opens the best checkpoint, and no other."""
    made = job(early_stopping_patience=2).run()
    best, last = made.event(ResultEvent).step, max(made.digests())
    spoil(made.dir / "checkpoints" / f"{last}-1")
    assert made.run().event(ResultEvent).step == best
    spoil(made.dir / "checkpoints" / f"{best}-1")
    assert made.attempt() == 1
    error = made.event(ErrorEvent)
    assert (error.code, f"step {best} " in error.message) == ("result_unusable", True)


def test_a_best_checkpoint_that_is_damaged_is_followed_by_the_next(job: Any) -> None:
    """Training goes on after it. The best of those that are there and come then is the result."""
    made = job(early_stopping_patience=100, resume_seconds=0)
    process = made.start()
    until_worse(process, made)
    process.kill()
    best = named(made)[-1]
    (made.dir / "checkpoints" / f"{best}-1" / "model.safetensors").write_bytes(b"")
    made.run()
    begun = made.events(MetricsEvent)[0].step
    assert begun > best, "the case shows nothing"
    later = {step: loss for step, loss in losses(made).items() if step >= begun}
    assert made.event(ResultEvent).step == min(later, key=later.__getitem__)
    assert any("is damaged" in event.message for event in made.events(MessageEvent))


def until_worse(process: Any, made: Job) -> None:
    """Wait until an evaluation has found a higher loss than one before, and a step was made after it."""
    found: dict[int, float] = {}
    while not found or found[max(found)] == min(found.values()):
        until(process, made, MetricsEvent, len(made.events(MetricsEvent)) + 1)
        found = losses(made)
    until(process, made, MetricsEvent, max(found) + 1)


def spoil(folder: Path) -> None:
    """Put a number that is none into a whole checkpoint."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[next(iter(weights))].view(-1)[0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    said = checkpoints.manifest(folder)
    assert said
    (folder / checkpoints.MANIFEST).unlink()
    rewritten = checkpoints.Manifest(said.step, said.attempt, said.metrics, checkpoints.durable(folder))
    (folder / checkpoints.MANIFEST).write_bytes(msgspec.json.encode(rewritten))


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
    found.note(5, 2.0, saved=True)
    assert (found.best_step, found.result(5, 2), found.result(5, None)) == (3, 3, 5)


@pytest.mark.parametrize("no_number", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_never_the_best(no_number: float) -> None:
    found = Selection()
    found.note(1, no_number, saved=True)
    assert (found.lowest, found.best, found.in_vain, found.result(1, 2)) == (None, None, 1, 1)
    found.note(2, 5.0, saved=True)
    found.note(3, no_number, saved=True)
    assert (found.lowest, found.best_step, found.in_vain) == (5.0, 2, 1)
    found = msgspec.json.decode(msgspec.json.encode(found), type=Selection)
    assert (found.best, found.result(3, 2)) == (5.0, 2)


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
