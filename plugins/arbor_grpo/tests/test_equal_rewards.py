"""Steps in which no group teaches anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grpo_jobs import FULL, Job, rollout, two_ranks

from arbor_core.testing import device
from arbor_core.types import Group, MetricsEvent

PROMPT, ANSWERS = list(b"what"), (list(b"yes"), list(b"no"))
KEYS: dict[str, Any] = {"learning_rate": 3e-3, "max_staleness": 64, "weight_decay": 0.1, "checkpoint_steps": 1}
LORA: dict[str, Any] = {"lora": {"dropout": 0.1}}


def pair(*rewards: float) -> Group:
    """Two rollouts, or more, on one prompt, with these rewards."""
    rollouts = [rollout(n, PROMPT, ANSWERS[n % 2], reward) for n, reward in enumerate(rewards)]
    return Group(id=0, rollouts=tuple(rollouts), version=0)


EQUAL, UNEQUAL = pair(1, 1), pair(1, 0)


def optimizer(job: Job, step: int) -> dict[str, Any]:
    return torch.load(job.dir / "checkpoints" / f"{step}-1" / "optimizer.pt", weights_only=True)["state"]


@pytest.mark.parametrize("more", [LORA, FULL, FULL | {"beta": 0.0, "num_iterations": 1, "micro_batch_size": 1}])
def test_equal_rewards_move_weights(job: Any, more: dict[str, Any]) -> None:
    """They move none, nor the optimizer: what follows is what it would be without them."""
    made, plain = job("made", max_steps=6, **KEYS | more), job("plain", max_steps=2, **KEYS | more)
    made.send(EQUAL, UNEQUAL, *[EQUAL] * 3, UNEQUAL)
    plain.send(UNEQUAL, UNEQUAL)
    made.must()
    plain.must()
    found, wanted = made.digests(), plain.digests()
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[1] != found[2]
    assert [found[step] for step in (2, 3, 4, 5, 6)] == [wanted[1]] * 4 + [wanted[2]]
    before, after = optimizer(made, 2), optimizer(made, 5)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[at][name], after[at][name]) for at in before for name in before[at])
    metrics = [event.data for event in made.events(MetricsEvent)]
    assert [one["frac_reward_zero_std"] for one in metrics] == [1, 0, 1, 1, 1, 0]
    assert [one["grad_norm"] == one["train_loss"] == 0 for one in metrics] == [True, False, True, True, True, False]


def test_a_job_of_an_older_server_goes_on_as_it_began(job: Any) -> None:
    made = job(max_steps=3, training_version=1, **KEYS | FULL)
    made.send(UNEQUAL, EQUAL, EQUAL)
    assert len(set(made.must().digests().values())) == 3


def test_a_group_that_teaches_is_enough(job: Any) -> None:
    made = job(max_steps=2, groups_per_step=2, micro_batch_size=1, **KEYS | FULL)
    made.send(UNEQUAL, EQUAL, EQUAL, EQUAL)
    found = made.must().digests()
    assert found[1] == found[2]
    assert made.events(MetricsEvent)[0].data["grad_norm"] > 0


@pytest.mark.parametrize("size", [2, 7, 49])
def test_equal_rewards_that_rounding_would_tell_apart(job: Any, size: int) -> None:
    """0.1 seven times has a mean that is not 0.1."""
    made = job(max_steps=2, **KEYS | FULL)
    made.send(UNEQUAL, pair(*[0.1 / 3] * size))
    found = made.must().digests()
    assert found[1] == found[2]


@pytest.mark.parametrize("keys", [{"top_entropy_quantile": 0.5}, {"mask_truncated_completions": True}], ids=str)
def test_other_reasons_to_learn_nothing(job: Any, keys: dict[str, Any]) -> None:
    cut = [rollout(n, PROMPT, ANSWERS[n], float(n), truncated=True) for n in range(2)]
    idle = Group(id=0, rollouts=tuple(cut), version=0) if "mask_truncated_completions" in keys else EQUAL
    made = job(max_steps=2, **KEYS | FULL | keys)
    made.send(UNEQUAL, idle)
    found = made.must().digests()
    assert found[1] == found[2]


@pytest.mark.slow
@pytest.mark.skipif(device().kind == "cuda", reason="one GPU, and NCCL wants one for each rank")
def test_equal_rewards_on_two_ranks(job: Any) -> None:
    made = job(max_steps=3, **KEYS | {"lora": {"dropout": 0.0}})
    made.send(UNEQUAL, EQUAL, UNEQUAL)
    two_ranks(made)
    first, second, third = made.digests().values()
    assert first == second != third
