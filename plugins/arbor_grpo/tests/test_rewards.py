"""Rewards by id: what was sampled is what is learned from, token by token."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from arbor_grpo.api.requests import Reward, RewardsRequest
from arbor_grpo.api.rewards import group_by_ids
from grpo_http import Job, created, launch, stop
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveServer

from arbor_core.jobdir.groups import read
from arbor_core.rollouts.completion_ledger import packed_floats, packed_ids
from arbor_core.types import ApiError, Completion, Group, RolloutSession


class Sampled:
    """As much of a job's rollouts as rewards need."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(temperature=1.0)
        self.known: dict[tuple[str, int], Completion] = {}
        self.spent: set[tuple[str, int]] = set()

    def add(self, id: str, prompt: Sequence[int], tokens: Sequence[int], index: int = 0, **more: Any) -> str:
        values: dict[str, Any] = {"version": 3, "temperature": 1.0, "logprobs": packed_floats([-0.5] * len(tokens))}
        self.known[id, index] = Completion(
            id=id, index=index, prompt=packed_ids(prompt), tokens=packed_ids(tokens), key=b"", **(values | more)
        )
        return id

    def is_spent(self, id: str, index: int = 0) -> bool:
        return (id, index) in self.spent

    def completion(self, id: str, index: int = 0) -> Completion | None:
        return self.known.get((id, index))


def grouped(sampled: Sampled, *rewards: Reward) -> Group:
    return group_by_ids(RewardsRequest(rewards=list(rewards)), cast("RolloutSession", sampled), 0, 0.0)


def ids(raw: bytes) -> list[int]:
    return array("i", raw).tolist()


def worth(id: str, reward: Any = 1.0, **more: Any) -> Reward:
    return Reward(completion_id=id, reward=reward, **more)


def no_reward(id: str, **more: Any) -> Reward:
    return Reward(completion_id=id, **more)


@pytest.fixture
def sampled() -> Sampled:
    return Sampled()


def test_one_turn_is_what_was_sampled(sampled: Sampled) -> None:
    sampled.add("a", [1, 2], [3, 4], version=5)
    sampled.add("a", [1, 2], [5], index=1, finish="length", version=4)
    group = grouped(sampled, worth("a", 0.5), worth("a", True, index=1))
    one, two = group.rollouts
    assert (ids(one.prompt), ids(one.completion), one.mask, one.completions) == ([1, 2], [3, 4], b"", ("a",))
    assert (ids(two.completion), two.truncated, two.reward, two.completions) == ([5], True, 1.0, ("a#1",))
    assert group.version == 4


def test_turns_that_repeat_what_came_before_are_one_sequence(sampled: Sampled) -> None:
    sampled.add("a1", [1], [2, 3])
    sampled.add("a2", [1, 2, 3, 9, 9], [4])
    sampled.add("b", [1], [7])
    group = grouped(sampled, no_reward("a2"), worth("b", 0), worth("a1", 2))
    assert [rollout.reward for rollout in group.rollouts] == [2.0, 0.0]
    turns = group.rollouts[0]
    assert (ids(turns.prompt), ids(turns.completion)) == ([1], [2, 3, 9, 9, 4])
    assert list(turns.mask) == [1, 1, 0, 0, 1]
    assert array("f", turns.logprobs).tolist() == [-0.5, -0.5, 0, 0, -0.5]
    assert turns.completions == ("a1", "a2")


def test_turns_that_do_not_are_branches_of_their_trajectory(sampled: Sampled) -> None:
    sampled.add("a1", [1], [2])
    sampled.add("a2", [1, 5, 5], [4])
    sampled.add("b", [1], [7])
    group = grouped(sampled, worth("a1", 1, trajectory="a"), worth("a2", 2, trajectory="a"), worth("b", trajectory=0))
    assert [(rollout.trajectory, rollout.reward) for rollout in group.rollouts] == [(0, 3.0), (0, 3.0), (1, 1.0)]


def test_trajectories_of_different_names_stay_apart(sampled: Sampled) -> None:
    sampled.add("a", [1], [2])
    sampled.add("b", [1, 2, 3], [4])
    group = grouped(sampled, worth("a", trajectory="a"), worth("b", trajectory="b"))
    assert len(group.rollouts) == 2


def test_row_83_empty_completions_join_nothing(sampled: Sampled) -> None:
    sampled.add("a", [1, 2], [])
    sampled.add("b", [1, 2], [3])
    group = grouped(sampled, worth("a"), worth("b"))
    assert [ids(rollout.completion) for rollout in group.rollouts] == [[], [3]]


def test_a_turn_is_gone_on_from_once(sampled: Sampled) -> None:
    sampled.add("a", [1], [2])
    sampled.add("b", [1, 2, 8], [3])
    sampled.add("c", [1, 2, 9], [4])
    group = grouped(sampled, worth("a"), worth("b"), worth("c"))
    assert sorted(rollout.completions for rollout in group.rollouts) == [("a", "b"), ("c",)]


def test_advantages_are_shared_and_of_the_whole_group(sampled: Sampled) -> None:
    for name in "abc":
        sampled.add(name, [1], [2])
    group = grouped(sampled, no_reward("a", advantage=0.5), no_reward("b", advantage=-0.5))
    assert [(rollout.reward, rollout.advantage) for rollout in group.rollouts] == [(None, 0.5), (None, -0.5)]
    with pytest.raises(ApiError, match="some have not"):
        grouped(sampled, no_reward("a", advantage=0.5), worth("b"))


@pytest.mark.parametrize(
    ("rewards", "code", "param"),
    [
        ([worth("a")], "group_size_mismatch", "rewards"),
        ([], "group_size_mismatch", "rewards"),
        ([worth("a"), worth("nobody")], "unknown_completion", "rewards[1].completion_id"),
        ([worth("a"), worth("a", index=7)], "unknown_completion", "rewards[1].completion_id"),
        ([worth("a"), worth("a")], "invalid_rollout", "rewards[1].completion_id"),
        ([worth("a"), worth("spent")], "reward_given", "rewards[1].completion_id"),
        ([worth("a"), worth("greedy")], "temperature_mismatch", "rewards[1].completion_id"),
        ([worth("a"), worth("untold")], "logprobs_unavailable", "rewards[1].completion_id"),
        ([worth("a"), worth("b", math.nan)], "invalid_rollout", "rewards[1].reward"),
        ([worth("a"), worth("b", "1")], "invalid_rollout", "rewards[1].reward"),
        ([worth("a"), worth("b", None)], "invalid_rollout", "rewards[1].reward"),
        ([worth("a"), no_reward("b")], "invalid_rollout", "rewards[1].reward"),
        (
            [worth("a"), worth("b", 1e18, trajectory="t"), worth("c", 1e18, trajectory="t")],
            "invalid_rollout",
            "rewards[1].reward",
        ),
    ],
)
def test_row_78_row_85_what_is_refused(sampled: Sampled, rewards: list[Reward], code: str, param: str) -> None:
    for name in ("a", "b", "c", "spent"):
        sampled.add(name, [1], [2])
    sampled.add("greedy", [1], [2], temperature=0.0)
    sampled.add("untold", [1], [2], logprobs=b"")
    sampled.spent.add(("spent", 0))
    with pytest.raises(ApiError) as caught:
        grouped(sampled, *rewards)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


TURNS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=3), st.lists(st.integers(0, 2), max_size=2)), min_size=1, max_size=5
)


@settings(max_examples=200, deadline=None)
@given(conversations=st.lists(TURNS, min_size=2, max_size=4), data=st.data())
def test_every_sampled_token_is_learned_once(conversations: list[Any], data: st.DataObject) -> None:
    sampled, rewards, total = Sampled(), [], 0
    for number, turns in enumerate(conversations):
        history = [100 + number]
        for turn, (said, answer) in enumerate(turns):
            history += said
            rewards.append(worth(sampled.add(f"{number}-{turn}", list(history), answer), 1.0))
            history += answer
            total += len(answer)
    group = grouped(sampled, *data.draw(st.permutations(rewards)))
    assert sum(sum(r.mask) if r.mask else len(r.completion) // 4 for r in group.rollouts) == total
    assert sorted(name for r in group.rollouts for name in r.completions) == sorted(r.completion_id for r in rewards)
    for rollout in group.rollouts:
        assert len(rollout.logprobs) == len(rollout.completion)
        assert len(rollout.mask) in (0, len(rollout.completion) // 4)
        first, *_ = (sampled.known[name, 0] for name in rollout.completions)
        last = sampled.known[rollout.completions[-1], 0]
        assert rollout.prompt == first.prompt
        assert rollout.prompt + rollout.completion == last.prompt + last.tokens


@pytest.fixture
def job(live_job: Job) -> Job:
    return live_job


def groups(job: Job) -> list[Group]:
    return [record.group for record in read(job.dir / "inbox", 0)]


def test_rewards_for_the_choices_of_one_completion(job: Job) -> None:
    answer = job.sample("red green blue white", n=3, return_token_ids=True, logprobs=True)
    rewards = [{"completion_id": answer["id"], "index": k, "reward": k / 2} for k in range(3)]
    said = job.ok("rewards", rewards=rewards, group="first")
    assert (said["matched"], said["tokenized"], said["batch_id"]) == (3, 0, 0)
    (group,) = groups(job)
    for rollout, choice in zip(group.rollouts, answer["choices"], strict=True):
        assert ids(rollout.completion) == choice["token_ids"]
        assert ids(rollout.prompt) == answer["prompt_token_ids"]
        told = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert array("f", rollout.logprobs).tolist() == pytest.approx(told)
    again = job.ok("rewards", rewards=rewards, group="first")
    assert (again["repeated"], again["batch_id"], again["matched"]) == (True, 0, 3)
    job.post("rewards", rewards=rewards).error(400, "reward_given", "rewards[0].completion_id")
    job.post("rewards", rewards=rewards[:2], group="first").error(400, "group_reuse", "group")
    assert len(groups(job)) == 1


def test_groups_that_are_too_large(job: Job) -> None:
    rewards = [{"completion_id": "a", "index": 0, "reward": 1}] * 16_385
    job.post("rewards", rewards=rewards).error(400, "invalid_value", "rewards")


def test_two_turns_over_http(job: Job) -> None:
    told = []
    for number in range(2):
        first = job.sample(f"red green {number}")
        talk = [
            {"role": "user", "content": f"red green {number}"},
            first["choices"][0]["message"],
            {"role": "user", "content": "and blue"},
        ]
        second = job.sample("", messages=talk)
        told += [
            {"completion_id": first["id"], "trajectory": f"{number}"},
            {"completion_id": second["id"], "trajectory": f"{number}", "reward": number},
        ]
    assert job.ok("rewards", rewards=told)["accepted"]
    assert next(rollout.reward for rollout in groups(job)[0].rollouts if rollout.trajectory == 1) == 1.0


def test_text_is_found_in_the_ledger_and_each_completion_once(job: Job) -> None:
    said = [job.sample("red green blue", seed=k)["choices"][0]["message"] for k in range(2)]
    batch = [
        {"messages": [{"role": "user", "content": "red green blue"}], "completion": one, "reward": k}
        for k, one in enumerate(said)
    ]
    first = job.step(batch)
    assert (first["matched"], first["tokenized"]) == (2, 0)
    second = job.step(batch)
    assert (second["matched"], second["tokenized"]) == (0, 2), "what was sampled once is matched once"


def test_what_differs_in_its_calls_or_tools_is_another_prompt(server: LiveServer, job: Job) -> None:
    def talk(city: str) -> list[dict[str, Any]]:
        call = {"name": "weather", "arguments": f'{{"city": "{city}"}}'}
        return [
            {"role": "user", "content": "how is the weather?"},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ]

    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    said = job.sample("", messages=talk("Paris"), tools=tools)["choices"][0]["message"]
    item = {"messages": talk("Paris"), "completion": said, "reward": 0}
    for other in ({**item, "tools": []}, {**item, "messages": talk("Rome"), "tools": tools}):
        answer = job.step([other, {**other, "reward": 1}])
        assert (answer["matched"], answer["tokenized"]) == (0, 2)
    answer = job.step([{**item, "tools": tools}, {**item, "tools": tools, "reward": 1}])
    assert (answer["matched"], answer["tokenized"]) == (1, 1)
    assert [rollout.tools for rollout in groups(job)[-1].rollouts] == [None, tools]
    job.sample("", messages=talk("Paris"), tools=tools)
    answer = job.step([item, {**item, "reward": 1}])
    assert answer["matched"] == 1, "clients that know no tools in groups do not say which there were"


def test_evaluations_are_refused_when_their_reward_comes(job: Job) -> None:
    told = [{"completion_id": job.sample(temperature=0)["id"], "reward": 1} for _ in range(2)]
    job.post("rewards", rewards=told).error(400, "temperature_mismatch", "rewards[0].completion_id")


def test_rewards_survive_the_server(tmp_path: Path) -> None:
    first = launch(tmp_path)
    job = created(first)
    answer = job.sample(n=2)
    rewards = [{"completion_id": answer["id"], "index": k, "reward": k} for k in range(2)]
    other = job.sample("another", n=2)
    job.ok("rewards", rewards=rewards, group="one")
    first.stop()
    server = launch(tmp_path)
    try:
        again = Job(server, job.id)
        assert again.ok("rewards", rewards=rewards, group="one")["repeated"]
        again.post("rewards", rewards=rewards, group="two").error(400, "reward_given", "rewards[0].completion_id")
        late = [{"completion_id": other["id"], "index": k, "reward": k} for k in range(2)]
        assert again.ok("rewards", rewards=late)["matched"] == 2
    finally:
        stop(server)
