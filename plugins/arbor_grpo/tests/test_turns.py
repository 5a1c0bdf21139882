"""Which completions go on from one another: the same as by trying each with each, in much less time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from arbor_grpo.api.requests import MOST_REWARDS, Reward
from arbor_grpo.api.turns import Entry, sequences
from hypothesis import given
from hypothesis import strategies as st

from arbor_core.rollouts.completion_ledger import packed_floats, packed_ids
from arbor_core.types import Completion


def entry(place: int, prompt: Sequence[int], answer: Sequence[int]) -> Entry:
    told = Completion(
        id=f"{place}",
        version=0,
        prompt=packed_ids(prompt),
        tokens=packed_ids(answer),
        logprobs=packed_floats([0.0] * len(answer)),
        temperature=1.0,
        key=b"",
    )
    return place, Reward(completion_id=told.id, reward=1.0), told


def each_with_each(entries: Sequence[Entry]) -> list[list[int]]:
    made: list[list[Entry]] = []

    def end(chain: list[Entry]) -> bytes:
        return chain[-1][2].prompt + chain[-1][2].tokens

    for one in sorted(entries, key=lambda entry: len(entry[2].prompt)):
        prompt = one[2].prompt
        begun = [chain for chain in made if len(chain[-1][2].prompt) < len(prompt) and prompt.startswith(end(chain))]
        if begun:
            max(begun, key=lambda chain: len(end(chain))).append(one)
        else:
            made.append([one])
    return [[place for place, _, _ in chain] for chain in made]


TOKENS = st.lists(st.integers(0, 1), max_size=6)


@given(turns=st.lists(st.tuples(TOKENS, TOKENS), max_size=14))
def test_any_turns_are_joined_as_by_trying_each_with_each(turns: list[Any]) -> None:
    entries = [entry(place, *turn) for place, turn in enumerate(turns)]
    made = sequences(entries)
    assert [[place for place, _, _ in one.entries] for one in made] == each_with_each(entries)
    for one in made:
        _, _, last = one.entries[-1]
        assert one.prompt + one.completion == last.prompt + last.tokens
        assert len(one.logprobs) == len(one.completion) == 4 * len(one.mask)


def test_the_largest_group_takes_no_minutes() -> None:
    """Trying each with each takes two of them, in which the server would do nothing else."""
    dice = random.Random(0)
    prompts = [[dice.randrange(1000) for _ in range(dice.randrange(40, 60))] for _ in range(MOST_REWARDS // 2)]
    entries = [entry(place, prompt, [1, 2, 3]) for place, prompt in enumerate(prompts)]
    entries += [entry(len(entries) + place, [*prompt, 1, 2, 3, 4], [5]) for place, prompt in enumerate(prompts)]
    begin = time.process_time()
    made = sequences(entries)
    assert time.process_time() - begin < 20
    assert len(made) == len(prompts)
