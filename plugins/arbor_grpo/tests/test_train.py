"""Jobs: steps, metrics, checkpoints, stopping, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from arbor_grpo.training.metrics import OUR_FOLDERS, OURS
from grpo_jobs import FULL, QUICK, Background, group, groups, two_ranks
from safetensors.torch import load_file

from arbor_core.testing import check_trainer, device
from arbor_core.types import (
    CheckpointEvent,
    ErrorEvent,
    Group,
    MessageEvent,
    MetricsEvent,
    PausedEvent,
    PolicyPublished,
    ResultEvent,
)

CLAIMED = ("train_loss", "kl", "step", "digest", "fed", "reward", "clip_ratio/region_mean", "client/kl")
"""Names of our metrics, not all of which such a job has."""

MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1}


def weights(job: Any) -> dict[str, torch.Tensor]:
    """Of the job's result."""
    (result,) = job.events(ResultEvent)
    folder = job.dir / "checkpoints" / result.dir
    return load_file(next(folder.glob("*.safetensors")))


def test_the_configuration_is_sound():
    check_trainer("grpo")


@pytest.mark.parametrize("more", [{}, FULL], ids=["lora", "full"])
def test_a_job_trains_publishes_and_ends(job, more):
    made = job(max_steps=3, **QUICK | more)
    said = {"validation_score": 2.0, "write": 2.0, "self": 2.0, **dict.fromkeys(CLAIMED, 777.0)}
    made.send(*(Group(**{**vars_of(each), "metrics": said}) for each in groups(6)))
    made.must()
    metrics = made.events(MetricsEvent)
    assert [event.data["step"] for event in metrics] == [1, 2, 3]
    assert [event.data["staleness_max"] for event in metrics] == [0, 1, 2]
    assert len(set(made.digests().values())) == 3
    first = metrics[0].data
    for name in (
        "train_loss",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "clip_ratio/region_mean",
        "grad_norm",
        "learning_rate",
        "sampling_logp_difference/mean",
        "wait_time",
        "train_time",
        "step_time",
        "publish_time",
        "publish_bytes",
        "completions/mean_length",
        "completions/clipped_ratio",
    ):
        assert isinstance(first[name], float | int), name
    assert first["validation_score"] == 2.0
    assert {name for name, value in first.items() if value == 777.0} == {f"client/{name}" for name in CLAIMED}
    theirs = {"validation_score", "write", "self", *(f"client/{name}" for name in CLAIMED)}
    assert all(name in OURS or name.partition("/")[0] in OUR_FOLDERS for name in first.keys() - theirs)
    published = made.events(PolicyPublished)
    assert [(event.version, event.handled) for event in published] == [(1, 2), (2, 4), (3, 6)]
    newest = made.dir / "weights" / published[-1].dir
    kept = weights(made)
    out = load_file(next(newest.glob("*.safetensors")))
    assert out.keys() == kept.keys()
    assert all(torch.equal(out[name], kept[name]) for name in out)
    wanted = {"generation_config.json", "config.json", "tokenizer.json"} if more else {"adapter_config.json"}
    assert wanted <= {path.name for path in newest.iterdir()}
    assert json.loads((newest / "generation_config.json").read_text())["eos_token_id"]
    (result,) = made.events(ResultEvent)
    assert result.adapter is not bool(more)
    assert result.trained_tokens > 0


def vars_of(each: Group) -> dict[str, Any]:
    return {name: getattr(each, name) for name in each.__struct_fields__}


@pytest.fixture
def adapter(job: Any) -> Path:
    """What another job has learned."""
    first = job("first", max_steps=1, **QUICK | {"lora": {"dropout": 0.0}})
    first.send(*groups(2))
    first.must()
    (result,) = first.events(ResultEvent)
    return first.dir / "checkpoints" / str(result.dir)


@pytest.mark.parametrize(
    "more",
    [{}, {"num_iterations": 2}, FULL, FULL | MOVING],
    ids=["lora", "iterations", "full", "moving_reference"],
)
def test_a_paused_job_goes_on_as_if_it_had_not_been(job, more):
    paused_goes_on(job, more)


def test_a_paused_job_that_began_from_an_adapter_goes_on_as_if_it_had_not_been(job, adapter):
    """Its reference is the adapter that it began with, before and after."""
    paused = paused_goes_on(job, {}, adapter)
    kept = [path for path in (paused.dir / "checkpoints").iterdir() if path.is_dir()]
    assert kept
    assert not [folder for path in kept for folder in path.iterdir() if folder.is_dir()]


def paused_goes_on(job: Any, more: dict[str, Any], adapter: Path | None = None) -> Any:
    """Pause a job after half of its batches and let it go on; compare it with one that was never paused."""
    keys = {"max_steps": 6, **QUICK, "beta": 0.05, **more}
    half = 3 if "num_iterations" not in more else 2
    whole = job("whole", adapter, **keys)
    whole.send(*groups(12))
    whole.must()
    paused = job("paused", adapter, **keys)
    paused.send(*groups(2 * half))
    attempt = Background(paused)
    attempt.until(MetricsEvent, half * more.get("num_iterations", 1))
    paused.ask("pause")
    assert attempt.end() == 0
    assert paused.events()[-1].type == "paused"
    paused.ask("run")
    paused.send(*groups(12 - 2 * half, 2 * half))
    paused.must()
    assert paused.digests() == whole.digests()
    assert len(whole.digests()) == 6
    for name in ("fed", "kl"):
        found = [event.data[name] for event in (*paused.events(MetricsEvent, attempt=1), *paused.events(MetricsEvent))]
        assert found == [event.data[name] for event in whole.events(MetricsEvent)]
    return paused


def test_a_killed_job_goes_on_from_its_last_checkpoint(job):
    keys = {"max_steps": 4, "checkpoint_steps": 2, **QUICK}
    whole = job("whole", **keys)
    whole.send(*groups(8))
    whole.must()
    killed = job("killed", **keys)
    killed.send(*groups(7))  # step 4 lacks a group
    process = killed.start()
    try:
        import time

        end = time.monotonic() + 120
        while len(killed.events(MetricsEvent)) < 3:
            assert process.poll() is None, killed.log
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    killed.send(*groups(1, 7))
    killed.must()
    assert killed.events(MetricsEvent)[0].data["step"] == 3
    assert killed.digests() == whole.digests()


@pytest.mark.parametrize("more", [{}, FULL, {"gradient_checkpointing": True}], ids=["lora", "full", "checkpointing"])
def test_shared_prompts_train_the_same_weights(job, more):
    found = []
    for name, share in (("shared", True), ("plain", False)):
        made = job(
            name, max_steps=8, **QUICK | {"lora": {"dropout": 0.0}, "learning_rate": 1e-3} | more, share_prompts=share
        )
        made.send(*groups(16))
        found.append(weights(made.must()))
    assert max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0]) < 1e-4


def test_checkpoints_are_named_while_the_inbox_is_empty(job):
    made = job(**QUICK, keep_checkpoints=1)
    made.request_checkpoint("zero", note="before")
    attempt = Background(made)
    attempt.until(CheckpointEvent, 2)
    made.send(*groups(2))
    attempt.until(MetricsEvent)
    made.request_checkpoint("one")
    attempt.until(CheckpointEvent, 4)
    made.ask("finish")
    assert attempt.end() == 0
    named = {event.name: event.step for event in made.events(CheckpointEvent) if event.name}
    assert named == {"zero": 0, "one": 1}
    assert (made.dir / "checkpoints" / "named" / "zero" / "adapter_model.safetensors").is_file()
    (result,) = made.events(ResultEvent)
    assert result.step == 1


def test_a_job_that_is_told_to_finish_before_its_first_group_has_the_model_as_it_was(job):
    made = job(**QUICK)
    made.ask("finish")
    made.must()
    (result,) = made.events(ResultEvent)
    assert (result.step, result.trained_tokens) == (0, 0)


def test_a_cancelled_job_stops_without_a_checkpoint(job):
    made = job(**QUICK)
    attempt = Background(made)
    attempt.until(MessageEvent)
    made.ask("cancel")
    assert attempt.end() == 0
    assert not made.events(CheckpointEvent, ResultEvent, ErrorEvent, PausedEvent)


def test_training_goes_on_from_another_jobs_adapter(job, adapter):
    second = job("second", adapter=adapter, max_steps=2, **QUICK, beta=0.1)
    second.send(*groups(4))
    second.must()
    published = second.events(PolicyPublished)
    assert [event.version for event in published] == [0, 1, 2]
    before = load_file(adapter / "adapter_model.safetensors")
    at_first = load_file(second.dir / "weights" / published[0].dir / "adapter_model.safetensors")
    assert before.keys() == at_first.keys()
    assert all(torch.equal(before[name], at_first[name]) for name in before)
    after = weights(second)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert second.events(MetricsEvent)[0].data["kl"] == pytest.approx(0, abs=1e-6)
    assert second.events(MetricsEvent)[1].data["kl"] > 0


def test_an_adapter_cannot_be_trained_as_full_weights(job, tmp_path):
    made = job(adapter=tmp_path, **FULL)
    assert made.run() == 1
    (error,) = made.events(ErrorEvent)
    assert "lora is null" in error.message


@pytest.mark.skipif(device().kind == "cuda", reason="one GPU, and NCCL wants one for each rank")
@pytest.mark.parametrize(
    "loss_type", ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bnpo", "dapo"))]
)
def test_two_ranks_train_what_one_does(job, loss_type):
    """Seven rows for two ranks, in micro-batches of two rows; one group is no good, one request for a checkpoint."""
    keys = {"max_steps": 3, "loss_type": loss_type, "micro_batch_size": 2, "learning_rate": 1e-3, "max_staleness": 64}
    found = []
    for name in ("one", "two"):
        made = job(name, **keys, beta=0.05, lora={"dropout": 0.0})
        made.send(group(1, size=7), Group(rollouts=(), version=0), group(2, size=7), group(3, size=5))
        made.request_checkpoint("early")
        made.must() if name == "one" else two_ranks(made)
        found.append(made)
    one, two = ([event.data for event in made.events(MetricsEvent)] for made in found)
    assert [step["fed"] for step in one] == [step["fed"] for step in two]
    for mine, theirs in zip(one, two, strict=True):
        for key in ("train_loss", "grad_norm", "kl", "entropy", "clip_ratio/region_mean"):
            assert mine[key] == pytest.approx(theirs[key], abs=2e-5, rel=1e-3), key
    first, second = map(weights, found)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    assert [e.name for e in found[1].events(CheckpointEvent) if e.name] == ["early"]
