"""Groups as rows: advantages, and what is refused."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from arbor_grpo import GrpoConfig
from arbor_grpo.training.intake import StepGroups
from arbor_grpo.training.rows import Reader, RejectedError, shaped, with_advantages
from arbor_sft.tiny import tokenizer
from arbor_trl.chat import ChatFormat
from arbor_trl.vocabulary import Vocabulary
from grpo_jobs import floats, group, rollout

from arbor_core.config.convert import merged, typed
from arbor_core.storage.codec import MAX_DEPTH
from arbor_core.testing.job_directory import yaml_of
from arbor_core.types import ConfigError, Group, Record, Rollout


def config(**more: Any) -> GrpoConfig:
    return typed(merged(yaml_of("grpo"), more), GrpoConfig, "hyperparameters")


def reader(**more: Any) -> Reader:
    return Reader(config(**more), None, vocabulary=Vocabulary(tokenizer(), 200), longest=more.get("max_length") or 64)


def one(**more: Any) -> Group:
    return Group(rollouts=(rollout(0, [1, 2], [3, 4], 1.0, **more),), version=0)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Group(rollouts=(), version=0), "no rollouts"),
        (Group(rollouts=(rollout(0, [1], [200], 1.0),), version=0), "embedding: that has 200"),
        (Group(rollouts=(rollout(0, [-1], [3], 1.0),), version=0), "token -1 .no token"),
        (Group(rollouts=(rollout(0, [], [3], 1.0),), version=0), "prompt is empty"),
        (one(logprobs=floats([-1.0])), "1 log-probabilities for 2"),
        (one(logprobs=floats([-1.0, float("nan")])), "not all finite"),
        (one(logprobs=floats([-1.0, 0.5])), "at most 0"),
        (one(mask=b"\1"), "mask has 1 entries for 2"),
        (one(advantage=float("inf")), "advantage inf"),
        (Group(rollouts=(Rollout(reward=float("nan"), prompt=b"\1\0\0\0"),), version=0), "reward nan"),
        (Group(rollouts=(Rollout(prompt=b"\1\0\0\0"),), version=0), "neither reward nor advantage"),
        (Group(rollouts=(Rollout(reward=1, prompt=b"\1\0\0"),), version=0), "whole number"),
        (Group(rollouts=(rollout(0, [1], [2], 1.0), rollout(0, [1], [2], 2.0)), version=0), "differ in reward"),
        (Group(rollouts=(Rollout(reward=1, messages=[{}], answer={}),), version=0), "no chat template"),
    ],
)
def test_a_group_that_cannot_be_used_is_rejected_with_a_reason(bad, why):
    with pytest.raises(RejectedError, match=why):
        reader().read(bad)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def told(levels: int) -> Group:
    """Text with so many lists and objects around one another."""
    said = [{"role": "user", "content": "a", "more": nested(levels - 1)}]
    return Group(rollouts=(Rollout(reward=1, messages=said, answer={"content": "b"}),), version=0)


def test_messages_are_nested_so_deeply_and_no_deeper():
    """However deep the trainer itself is when it reads them."""
    chatting = Reader(config(), ChatFormat(tokenizer()), vocabulary=Vocabulary(tokenizer(), 1000), longest=64)
    assert chatting.read(told(MAX_DEPTH)).rows[0].tokens
    for levels in (MAX_DEPTH + 1, 600, 5000):
        with pytest.raises(RejectedError, match=r"rollout 0: messages\[0\] is nested too deeply: more than 64 levels"):
            chatting.read(told(levels))


def test_what_the_template_leaves_out_is_rejected():
    """Text of the policy, and of what came before."""
    found = tokenizer()
    found.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chatting = Reader(config(), ChatFormat(found), vocabulary=Vocabulary(found, 1000), longest=512)
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    calling, question = {"content": None, "tool_calls": [call]}, {"role": "user", "content": "a"}
    told = {
        "answer": ([question], calling),
        r"messages\[1\]": ([question, {"role": "assistant", **calling}, question], {"content": "b"}),
    }
    for where, (messages, answer) in told.items():
        group = Group(rollouts=(Rollout(reward=1, messages=messages, answer=answer),), version=0)
        with pytest.raises(RejectedError, match=rf"leaves out {where}\.tool_calls\[0\]\.function\.name"):
            chatting.read(group)


def test_a_thought_that_the_prompt_opens_is_not_closed_for_the_policy():
    """As DeepSeek-R1's distillations do: whoever sends text has to say what was thought."""
    found = tokenizer()
    found.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    chatting = Reader(config(), ChatFormat(found), vocabulary=Vocabulary(found, 1000), longest=512)

    def completion(answer: dict[str, Any]) -> str:
        question = [{"role": "user", "content": "a"}]
        rollout = Rollout(reward=1, messages=question, answer=answer)
        (row,) = chatting.read(Group(rollouts=(rollout,), version=0)).rows
        return str(found.decode(row.completion))

    thought = "It is\n</think>\n\nb<|im_end|>"
    assert completion({"content": "It is\n</think>\n\nb"}) == thought
    assert completion({"content": "b", "reasoning_content": "It is"}) == thought
    with pytest.raises(RejectedError, match="opens a thought with <think>"):
        completion({"content": "It is"})


def advantages(*groups: Group, **more: Any) -> list[float]:
    found = reader(**more)
    return [row.advantage for row in with_advantages([found.read(each) for each in groups], found.config)[0]]


def rewarded(*rewards: float, trajectories: tuple[int, ...] = ()) -> Group:
    numbers = trajectories or tuple(range(len(rewards)))
    return Group(rollouts=tuple(rollout(n, [1], [2], r) for n, r in zip(numbers, rewards, strict=True)), version=0)


def test_advantages_compare_with_the_group():
    spread = statistics.stdev([0, 1, 2])
    assert advantages(rewarded(0, 1, 2)) == pytest.approx([-1 / (spread + 1e-4), 0, 1 / (spread + 1e-4)])
    assert advantages(rewarded(0, 1, 2), scale_rewards="none") == [-1, 0, 1]
    assert advantages(rewarded(5, 5), rewarded(0, 1)) == pytest.approx([0, 0, -0.70701, 0.70701], abs=1e-4)
    whole = statistics.stdev([5, 5, 0, 1]) + 1e-4
    assert advantages(rewarded(5, 5), rewarded(0, 1), scale_rewards="batch") == pytest.approx(
        [0, 0, -0.5 / whole, 0.5 / whole]
    )


def test_a_trajectory_of_several_rows_counts_once():
    assert advantages(rewarded(3, 3, 3, 0, trajectories=(0, 0, 0, 1)), scale_rewards="none") == [1.5, 1.5, 1.5, -1.5]


def test_long_trajectories_lose_of_a_positive_reward():
    settings = config(max_completion_length=20, soft_completion_penalty_length=10)
    assert [shaped(2.0, n, settings) for n in (10, 15, 20, 25)] == [2.0, 1.0, 0.0, 0.0]
    assert shaped(-2.0, 20, settings) == -2.0
    assert shaped(2.0, 20, config()) == 2.0


def test_long_rows_are_cut_at_their_end():
    found = reader(max_length=4).read(Group(rollouts=(rollout(0, [1, 2, 3], [4, 5, 6], 1.0),), version=0)).rows[0]
    assert (found.prompt.tolist(), found.completion.tolist(), found.cut) == ([1, 2, 3], [4], True)
    assert found.logprobs is not None
    assert len(found.logprobs) == len(found.mask) == 1


def records(*groups: Group) -> list[Record]:
    return [Record(start=n, end=n + 1, crc=n, digest=0, group=each) for n, each in enumerate(groups)]


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_what_is_skipped_depends_on_the_inbox_alone(chunk):
    """Stale groups are passed over and counted, in whatever pieces the inbox is read."""
    bad = Group(rollouts=(), version=9)
    arrived = records(*(group(n, version=v) for n, v in enumerate((5, 2, 4, 3))), bad, group(9, version=4), group(10))
    found = reader(max_staleness=1, groups_per_step=3)
    gathering = StepGroups(position=0, step=5)
    for at in range(0, len(arrived), chunk):
        if gathering.take(arrived[at : at + chunk], found):
            break
    assert [record.start for record, _ in gathering.used] == [0, 2, 5]
    assert [record.start for record in gathering.stale] == [1, 3]
    assert [record.start for record, _ in gathering.rejected] == [4]
    assert gathering.inputs.end == gathering.position == 6
    assert gathering.inputs.skipped == (1, 3, 4)
    assert gathering.ages == [0, 1, 1]


def test_more_stale_groups_may_be_used_than_there_are_credits_for():
    found = reader(max_staleness=0, max_group_age=3)
    gathering = StepGroups(position=0, step=3)
    assert gathering.take(records(group(1, version=0)), found)


@pytest.mark.parametrize(
    ("keys", "oldest"),
    [
        ({}, 1),
        ({"num_iterations": 3}, 3),
        ({"publish_steps": 3}, 3),
        ({"num_iterations": 3, "publish_steps": 3}, 9),
        ({"num_iterations": 3, "max_group_age": 4}, 12),
    ],
)
def test_age_is_counted_in_batches(keys, oldest):
    """`oldest`: of the steps between batches the last at which a group of the first policy is used."""
    found = reader(max_staleness=1, **keys)
    iterations = found.config.num_iterations
    used = [
        step
        for step in range(0, 30, iterations)
        if StepGroups(0, step, iterations).take(records(group(1, version=0)), found)
    ]
    assert used == list(range(0, oldest + 1, iterations))


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"lr_scheduler_type": "cosine"}, "max_steps"),
        ({"importance_sampling_mode": "token_mask"}, "ratio"),
        ({"sync_ref_model": True}, "beta"),
        ({"soft_completion_penalty_length": 5}, "max_completion_length"),
        ({"publish_steps": 3, "max_group_age": 1}, "max_group_age"),
        ({"num_generation": 4}, "num_generations"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_keys_that_contradict_one_another_are_refused(keys, word):
    with pytest.raises(ConfigError, match=word):
        config(**keys)
