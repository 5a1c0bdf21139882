"""Jobs: which groups become batches, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
from arbor_grpo.training.session import WITHOUT_DIFFERENCES
from grpo_jobs import QUICK, Background, group, groups, rollout

from arbor_core.types import Group, GroupsSkipped, MessageEvent, MetricsEvent, ResultEvent, Rollout


def deep() -> Group:
    """Its message is nested deeper than Python can follow."""
    said: dict[str, Any] = {"role": "user", "content": "a"}
    for _ in range(700):
        said = {"role": "user", "content": "a", "more": said}
    return Group(id=7, rollouts=(Rollout(reward=1.0, messages=[said], answer={"content": "b"}),), version=0)


@pytest.mark.parametrize(
    "bad", [Group(id=7, rollouts=(rollout(0, [97], [9999], 1.0),), version=0), deep()], ids=["tokens", "nested"]
)
def test_groups_that_are_no_good_are_said_and_their_credit_is_freed(job, bad):
    made = job(max_steps=1, **QUICK | {"groups_per_step": 1})
    made.send(bad)
    attempt = Background(made)
    attempt.until(GroupsSkipped)
    (said,) = [event for event in made.events(MessageEvent) if event.level == "warn"]
    assert said.data["batch_id"] == 7
    assert made.handled() == [1]
    made.send(*groups(1))
    assert attempt.end() == 0
    (metrics,) = made.events(MetricsEvent)
    assert metrics.data["groups_rejected"] == 1
    assert metrics.fed.skipped == (0,)
    assert made.handled()[-1] == 2


def test_stale_groups_are_skipped_and_counted(job):
    made = job(max_steps=2, **QUICK | {"groups_per_step": 1, "max_staleness": 0})
    made.send(group(1), group(2), group(3, version=1))
    made.must()
    assert [event.data["groups_skipped"] for event in made.events(MetricsEvent)] == [0, 1]


@pytest.mark.parametrize(
    ("more", "versions", "ages"),
    [
        ({"num_iterations": 2, "max_steps": 6}, (0, 0, 2), [0, 0, 1, 1, 1, 1]),
        ({"publish_steps": 2, "max_steps": 4}, (0, 0, 0, 2), [0, 1, 2, 1]),
    ],
    ids=["iterations", "publish_steps"],
)
def test_groups_that_credits_asked_for_are_used(job, more, versions, ages):
    """Each was sampled from the newest policy that was out when its credit was given, one batch ahead."""
    made = job(**QUICK | {"groups_per_step": 1, "max_staleness": 1} | more)
    made.send(*(group(n, version=version) for n, version in enumerate(versions)))
    attempt = Background(made)
    attempt.until(MetricsEvent, len(ages))
    assert attempt.end() == 0
    metrics = [event.data for event in made.events(MetricsEvent)]
    assert [step["groups_skipped"] for step in metrics] == [0] * len(ages)
    assert [step["staleness_max"] for step in metrics] == ages


def equal(seed: int) -> Group:
    """A group that teaches nothing."""
    return Group(rollouts=tuple(rollout(n, [97, 98], [99, seed], 0.5) for n in range(2)), version=0)


def test_a_step_in_which_nothing_runs_has_no_entropy(job):
    made = job(max_steps=2, **QUICK | {"groups_per_step": 1})
    made.send(equal(97), group(1))
    made.must()
    nothing, something = (event.data for event in made.events(MetricsEvent))
    assert (nothing["train_loss"], nothing["frac_reward_zero_std"]) == (0, 1)
    assert not [name for name in nothing if name == "entropy" or name.startswith("clip_ratio")]
    assert something["entropy"] > 0
    assert "clip_ratio/region_mean" in something


def test_row_82_rewards_that_never_differ_are_warned_of_once_until_they_do(job):
    batches = [*[equal(97)] * WITHOUT_DIFFERENCES, equal(98), group(1), *[equal(99)] * WITHOUT_DIFFERENCES]
    made = job(max_steps=len(batches), **QUICK | {"groups_per_step": 1})
    made.send(*batches)
    made.must()
    warnings = [event for event in made.events() if event.data.get("batches_without_differences")]
    assert [event.level for event in warnings] == ["warn", "warn"]
    assert "nothing is learned from rewards" in warnings[0].message
    told = [event for event in made.events() if event in warnings or event.type == "metrics"]
    assert [at for at, event in enumerate(told) if event in warnings] == [WITHOUT_DIFFERENCES - 1, len(batches)]
    assert made.events(ResultEvent)


def test_row_82_advantages_of_the_client_teach_whatever_the_rewards(job):
    said = [rollout(n, [97, 98], [99, 97], 0.5, advantage=n - 0.5) for n in range(2)]
    made = job(max_steps=WITHOUT_DIFFERENCES, **QUICK | {"groups_per_step": 1})
    made.send(*[Group(rollouts=tuple(said), version=0)] * WITHOUT_DIFFERENCES)
    made.must()
    assert not [event for event in made.events() if event.level == "warn"]
