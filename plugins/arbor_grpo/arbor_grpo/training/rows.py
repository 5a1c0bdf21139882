"""Groups as rows of tokens with advantages; what is wrong with a group that cannot be used.

A row is one sequence to learn from. A trajectory is one row, or several that share its reward and advantage.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from arbor_trl.chat import IGNORED, ChatFormat
from arbor_trl.vocabulary import Vocabulary
from numpy.typing import NDArray

from arbor_core import Group, LeftOutError, Rollout
from arbor_grpo import GrpoConfig

Ids = NDArray[np.int32]
SCALE_FLOOR = 1e-4
"""Added to the standard deviation that advantages are divided by, as in TRL."""
ABOVE_ZERO = 1e-3
"""Log-probabilities may be so far above 0 by rounding."""


class RejectedError(ValueError):
    """A group cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Row:
    """One sequence: P prompt tokens, C completion tokens."""

    prompt: Ids
    completion: Ids
    mask: NDArray[np.bool_]
    """Of each completion token, whether it is learned: the policy sampled it, and the row is not left out."""
    logprobs: NDArray[np.float32] | None
    """The sampler's, one for each completion token; None: not known."""
    advantage: float
    sampled: int
    """Completion tokens that the policy sampled."""
    truncated: bool
    cut: bool = False
    """It was longer than sequences may be."""

    @property
    def tokens(self) -> int:
        """Tokens with a loss."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Trajectory:
    """What a group's client sent about one of its trajectories."""

    reward: float | None
    advantage: float | None
    tokens: int
    """That the policy sampled."""


@dataclass(frozen=True)
class GroupRows:
    """A group that can be trained on, before its advantages are known."""

    rows: tuple[Row, ...]
    """With advantage 0."""
    trajectories: dict[int, Trajectory]
    trajectory_of: tuple[int, ...]
    """The trajectory of each row."""


@dataclass(frozen=True)
class Reader:
    """Turns groups into tokens.

    Args:
        chat: Tokenises rollouts that are text; None: the model has no chat template.
        vocabulary: The tokens that the model can read.
        longest: Tokens of the longest sequence.
    """

    config: GrpoConfig
    chat: ChatFormat | None
    vocabulary: Vocabulary
    longest: int

    def read(self, group: Group) -> GroupRows:
        """The group's rows.

        Raises:
            RejectedError: it cannot be trained on.
        """
        if not group.rollouts:
            raise RejectedError("it has no rollouts")
        rows = []
        for index, rollout in enumerate(group.rollouts):
            try:
                rows.append(self._row(rollout))
            except ValueError as error:
                raise RejectedError(f"rollout {index}: {error}") from None
        return GroupRows(tuple(rows), trajectories(group.rollouts, rows), tuple(r.trajectory for r in group.rollouts))

    def _row(self, rollout: Rollout) -> Row:
        if rollout.messages is not None or rollout.answer is not None:
            prompt, completion = self._tokenised(rollout)
            sampled, logprobs = np.ones(len(completion), dtype=np.bool_), None
        else:
            prompt, completion = ids(rollout.prompt, "prompt"), ids(rollout.completion, "completion")
            sampled, logprobs = sampled_mask(rollout, len(completion)), sampler_logprobs(rollout, len(completion))
        if not len(prompt):
            raise ValueError("its prompt is empty, so nothing predicts the first token")
        for part in (prompt, completion):
            if len(part) and (fault := self.vocabulary.fault((int(part.min()), int(part.max())))):
                raise ValueError(fault)
        learned = np.zeros_like(sampled) if rollout.truncated and self.config.mask_truncated_completions else sampled
        room = max(0, self.longest - len(prompt))
        cut = len(completion) > room
        return Row(
            prompt=prompt[: self.longest],
            completion=completion[:room],
            mask=learned[:room],
            logprobs=None if logprobs is None else logprobs[:room],
            advantage=0.0,
            sampled=int(sampled.sum()),
            truncated=rollout.truncated,
            cut=cut,
        )

    def _tokenised(self, rollout: Rollout) -> tuple[Ids, Ids]:
        """A rollout of text: its prompt as an engine would tokenise it, and the answer with the token that ends it. An
        answer that was cut short has no end."""
        if self.chat is None:
            raise ValueError("it is text, but the model has no chat template: send tokens")
        if not rollout.messages or rollout.answer is None:
            raise ValueError("it is text, so it needs messages and an answer")
        messages = [*rollout.messages, {**rollout.answer, "role": "assistant"}]
        try:
            conversation = self.chat.chats.conversation(messages, rollout.tools)
            (sample,) = self.chat.encode([self.chat.turn(conversation, len(rollout.messages), sampled=True)])
        except LeftOutError as error:
            answer = f"messages[{len(rollout.messages)}]"
            raise LeftOutError(error.field.replace(answer, "answer", 1), changed=error.changed) from None
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its messages are no messages of a chat: {error!r}") from None
        first = next((at for at, label in enumerate(sample.labels) if label != IGNORED), len(sample.ids))
        last = max((at for at, label in enumerate(sample.labels) if label != IGNORED), default=first - 1)
        completion = sample.ids[first : last + 1]
        if rollout.truncated and completion and completion[-1] in self.chat.stop_ids:
            completion = completion[:-1]
        return np.array(sample.ids[:first], dtype=np.int32), np.array(completion, dtype=np.int32)


def ids(raw: bytes, what: str) -> Ids:
    if len(raw) % 4:
        raise ValueError(f"its {what} is {len(raw)} bytes, not a whole number of int32 tokens")
    return np.frombuffer(raw, dtype="<i4").astype(np.int32)


def sampled_mask(rollout: Rollout, count: int) -> NDArray[np.bool_]:
    if not rollout.mask:
        return np.ones(count, dtype=np.bool_)
    mask = np.frombuffer(rollout.mask, dtype=np.uint8)
    if len(mask) != count:
        raise ValueError(f"its mask has {len(mask)} entries for {count} completion tokens")
    return mask.astype(np.bool_)


def sampler_logprobs(rollout: Rollout, count: int) -> NDArray[np.float32] | None:
    if not rollout.logprobs:
        return None
    if len(rollout.logprobs) != 4 * count:
        raise ValueError(f"it has {len(rollout.logprobs) / 4:g} log-probabilities for {count} completion tokens")
    found = np.frombuffer(rollout.logprobs, dtype="<f4").astype(np.float32)
    if not np.isfinite(found).all() or (found > ABOVE_ZERO).any():
        raise ValueError("its log-probabilities are not all finite and at most 0")
    return found


def trajectories(rollouts: Sequence[Rollout], rows: Sequence[Row]) -> dict[int, Trajectory]:
    """The group's trajectories by number.

    Raises:
        RejectedError: one has neither reward nor advantage, or two of either, or a number that is not finite.
    """
    found: dict[int, Trajectory] = {}
    for rollout, row in zip(rollouts, rows, strict=True):
        key, worth = rollout.trajectory, (rollout.reward, rollout.advantage)
        before = found.get(key, Trajectory(*worth, tokens=0))
        if (before.reward, before.advantage) != worth:
            raise RejectedError(f"rollouts of trajectory {key} differ in reward or advantage")
        if any(number is not None and not math.isfinite(number) for number in worth):
            raise RejectedError(f"trajectory {key} has the reward {worth[0]} and the advantage {worth[1]}")
        if worth == (None, None):
            raise RejectedError(f"trajectory {key} has neither reward nor advantage")
        found[key] = Trajectory(*worth, tokens=before.tokens + row.sampled)
    return found


def shaped(reward: float, tokens: int, config: GrpoConfig) -> float:
    """A reward less the penalty for a long trajectory: it falls linearly to 0 at the longest."""
    free, longest = config.soft_completion_penalty_length, config.max_completion_length
    if free is None or longest is None or reward <= 0 or tokens <= free:
        return reward
    return reward * max(0.0, 1 - (tokens - free) / (longest - free))


def deviation(rewards: Sequence[float]) -> float:
    """Standard deviation with Bessel's correction; 0 of a single one."""
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0


@dataclass(frozen=True)
class Rewards:
    """The rewards of a step, for its metrics: of each group, one for each trajectory that has one."""

    of_groups: list[list[float]]

    @property
    def all(self) -> list[float]:
        return [reward for group in self.of_groups for reward in group]

    def metrics(self) -> dict[str, float]:
        if not self.all:
            return {}
        compared = [group for group in self.of_groups if group]
        return {
            "reward": statistics.fmean(self.all),
            "reward_std": deviation(self.all),
            "frac_reward_zero_std": statistics.fmean(math.isclose(deviation(g), 0, abs_tol=1e-8) for g in compared),
        }


def with_advantages(groups: Sequence[GroupRows], config: GrpoConfig) -> tuple[list[Row], Rewards]:
    """All rows of a step with their advantages: a trajectory's reward less the mean of its group's, divided as
    `scale_rewards` says. An advantage that the client sent is taken as it is."""
    shaped_rewards = [
        {k: shaped(t.reward, t.tokens, config) for k, t in group.trajectories.items() if t.reward is not None}
        for group in groups
    ]
    rewards = Rewards([list(one.values()) for one in shaped_rewards])
    rows = []
    for group, rewards_of_group in zip(groups, shaped_rewards, strict=True):
        mean = statistics.fmean(rewards_of_group.values()) if rewards_of_group else 0.0
        scale = {"group": list(rewards_of_group.values()), "batch": rewards.all}.get(config.scale_rewards)
        # the mean of equal rewards may be another number than these, by rounding
        equal = config.training_version > 1 and len(set(rewards_of_group.values())) == 1
        divisor = 1.0 if scale is None else deviation(scale) + SCALE_FLOOR
        for row, key in zip(group.rows, group.trajectory_of, strict=True):
            given = group.trajectories[key].advantage
            advantage = given if given is not None else 0.0 if equal else (rewards_of_group[key] - mean) / divisor
            rows.append(Row(**{**vars(row), "advantage": advantage}))
    return rows, rewards
