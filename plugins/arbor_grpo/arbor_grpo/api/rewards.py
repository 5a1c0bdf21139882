"""Rewards for completions by their ids: exactly what was sampled is trained on.

Completions of several turns become one sequence where each prompt repeats, token by token, what came before; what the
environment wrote between them is masked. Where a prompt does not (a template that drops earlier thoughts, a history
that was cut), the turns stay apart, as branches of one trajectory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from arbor_core import Completion, Group, Rollout
from arbor_core.http import ApiError, RolloutSession, name_of

from .groups import SAME_TEMPERATURE, check_alike, invalid, number, numbers
from .requests import Reward, RewardsRequest
from .turns import Entry, Turns, sequences


def group_by_ids(request: RewardsRequest, live: RolloutSession, batch_id: int, at: float) -> Group:
    """A group for the inbox.

    Raises:
        ApiError: it cannot be one; nothing was changed.
    """
    entries = find_completions(request.rewards, live)
    rollouts: list[Rollout] = []
    trajectories = list(trajectories_of(entries))
    if len(trajectories) < 2:
        message = f"Invalid 'rewards': expected at least two trajectories to compare, received {len(trajectories)}."
        raise invalid(message, "rewards", "group_size_mismatch")
    for index, sequences_of_one in enumerate(trajectories):
        reward, advantage = reward_and_advantage([entry for turns in sequences_of_one for entry in turns.entries])
        rollouts += [turns.rollout(index, reward, advantage) for turns in sequences_of_one]
    check_alike(rollouts, "rewards")
    version = min(completion.version for _, _, completion in entries)
    return Group(
        id=batch_id,
        rollouts=tuple(rollouts),
        version=version,
        label=request.group,
        metrics=numbers(request.metrics),
        at=at,
    )


def find_completions(rewards: Sequence[Reward], live: RolloutSession) -> list[Entry]:
    """What was sampled under each id.

    Raises:
        ApiError: an id is unknown, was rewarded before or twice here, or cannot be trained on.
    """
    found: list[Entry] = []
    seen: set[tuple[str, int]] = set()
    for place, reward in enumerate(rewards):
        path = f"rewards[{place}].completion_id"
        name = name_of(reward.completion_id, reward.index)
        if (reward.completion_id, reward.index) in seen:
            raise invalid(f"Invalid '{path}': {name[:80]} is in this request twice.", path)
        seen.add((reward.completion_id, reward.index))
        if live.is_spent(reward.completion_id, reward.index):
            raise invalid(f"Invalid '{path}': the reward of {name[:80]} was given before.", path, "reward_given")
        completion = live.completion(reward.completion_id, reward.index)
        if completion is None:
            message = f"Invalid '{path}': this job's model has not sampled {name[:80]}, or it is too long ago."
            raise invalid(message, path, "unknown_completion")
        check_usable(completion, live.config.temperature, path)
        found.append((place, reward, completion))
    return found


def check_usable(completion: Completion, temperature: float, path: str) -> None:
    """Whether a completion was sampled as the trainer computes.

    Raises:
        ApiError: at another temperature, or its log-probabilities are not known.
    """
    if abs(completion.temperature - temperature) > SAME_TEMPERATURE:
        message = (
            f"Invalid '{path}': it was sampled at temperature {completion.temperature:g}, this job learns from "
            f"{temperature:g}."
        )
        raise invalid(message, path, "temperature_mismatch")
    if len(completion.logprobs) != len(completion.tokens):
        message = f"Invalid '{path}': its engine could not tell the log-probabilities of this completion."
        raise invalid(message, path, "logprobs_unavailable")


def trajectories_of(entries: Sequence[Entry]) -> list[list[Turns]]:
    """The trajectories, each with its sequences, in the order in which their first completions were listed."""
    named: dict[str | int | None, list[Entry]] = defaultdict(list)
    for entry in entries:
        named[entry[1].trajectory].append(entry)
    trajectories = [[turns] for turns in sequences(named.pop(None, ()))]
    trajectories += [sequences(of_one) for of_one in named.values()]
    return sorted(trajectories, key=lambda one: min(entry[0] for turns in one for entry in turns.entries))


def reward_and_advantage(entries: Sequence[Entry]) -> tuple[float | None, float | None]:
    """Reward of a trajectory, the sum of its completions'; and its advantage, which they share.

    Raises:
        ApiError: it has neither, or two advantages.
    """
    rewards = [number(reward.reward, f"rewards[{place}].reward") for place, reward, _ in entries]
    advantages = {number(reward.advantage, f"rewards[{place}].advantage") for place, reward, _ in entries} - {None}
    path = f"rewards[{min(place for place, _, _ in entries)}]"
    if len(advantages) > 1:
        raise invalid(f"Invalid '{path}.advantage': the completions of a trajectory share it.", f"{path}.advantage")
    known = [reward for reward in rewards if reward is not None]
    if not known and not advantages:
        message = f"Missing required parameter: '{path}.reward'. Every trajectory has a reward or an advantage."
        raise ApiError(400, message, "invalid_rollout", f"{path}.reward")
    total = number(sum(known), f"{path}.reward") if known else None
    return total, next(iter(advantages), None)
