"""Groups that clients send as text, on their way to the inbox: their completions are looked for in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from arbor_core import Completion, Group, Rollout, canonical, canonical_message
from arbor_core.http import (
    MAX_DEPTH,
    ApiError,
    ConfigError,
    RolloutSession,
    Rules,
    key_of,
    key_of_tools,
    name_of,
    read_chat_data,
    read_message,
    too_deep,
)

from .requests import Item, StepRequest

LARGEST = 1e18
"""Larger numbers overflow when they are squared in single precision."""
SAME_TEMPERATURE = 1e-6


def invalid(message: str, param: str, code: str = "invalid_rollout") -> ApiError:
    """400 for a group of which nothing was applied."""
    return ApiError(400, message, code, param)


def number(value: Any, param: str) -> float | None:
    """A reward or an advantage; None where none was sent.

    Raises:
        ApiError: `invalid_rollout`.
    """
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and abs(value) <= LARGEST:  # which NaN is not
        return float(value)
    if isinstance(value, msgspec.UnsetType):
        return None
    kind = "a larger one" if isinstance(value, int | float) else type(value).__name__
    raise invalid(f"Invalid '{param}': expected a finite number up to {LARGEST:g}, got {kind}.", param)


def digest_of(content: Any, param: str) -> int:
    """64 bits that stand for what a client sent, however it was spaced.

    Raises:
        ApiError: it is nested too deeply.
    """
    try:
        raw = msgspec.json.encode(content)
    except RecursionError:
        raise invalid(f"Invalid '{param}': it is nested more than {MAX_DEPTH} deep.", param) from None
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers among a client's metrics."""
    return {
        name[:64]: float(value)
        for name, value in list((metrics or {}).items())[:64]
        if isinstance(value, int | float) and abs(value) <= LARGEST
    }


def trajectories(request: StepRequest, count: int) -> list[tuple[str, list[Item]]]:
    """The trajectories of a group with their paths; one of a flat group is one item.

    Raises:
        ApiError: there are not `count` of them, or flat and nested ones are mixed.
    """
    nested = [isinstance(entry, list) for entry in request.batch]
    if any(nested) and not all(nested):
        raise invalid("Invalid 'batch': items and lists of items are mixed.", "batch")
    if len(request.batch) != count:
        message = f"Invalid 'batch': expected {count} samples in the group (num_generations), received {len(nested)}."
        raise invalid(message, "batch", "group_size_mismatch")
    found = []
    for index, entry in enumerate(request.batch):
        items = entry if isinstance(entry, list) else [entry]
        if not items:
            raise invalid(f"Invalid 'batch[{index}]': a trajectory has at least one item.", f"batch[{index}]")
        found.append((f"batch[{index}]", items))
    return found


def reward_and_advantage(entries: Sequence[tuple[str, Item]]) -> tuple[float | None, float | None]:
    """Reward and advantage of a trajectory: those that its items share.

    Raises:
        ApiError: it has none, or two of either.
    """
    values: dict[str, set[float]] = {"reward": set(), "advantage": set()}
    for path, item in entries:
        for name, found in values.items():
            value = number(getattr(item, name), f"{path}.{name}")
            if value is not None:
                found.add(value)
    path = entries[0][0]
    for name, found in values.items():
        if len(found) > 1:
            raise invalid(
                f"Invalid '{path}': its items differ in '{name}', which is that of the whole trajectory.", path
            )
    if not values["reward"] and not values["advantage"]:
        message = f"Missing required parameter: '{path}.reward'. Every trajectory has a reward or an advantage."
        raise ApiError(400, message, "invalid_rollout", f"{path}.reward")
    return next(iter(values["reward"]), None), next(iter(values["advantage"]), None)


def check_alike(rollouts: Sequence[Rollout], param: str) -> None:
    """Advantages are of a whole group, and so are rewards where there are no advantages.

    Raises:
        ApiError: some have one and some have not.
    """
    for name in ("advantage", "reward"):
        have = sum(getattr(rollout, name) is not None for rollout in rollouts)
        if have == len(rollouts):
            return
        if have:
            raise invalid(f"Invalid '{param}': some trajectories have the {name} and some have not.", param)


def answer_of(completion: Mapping[str, Any] | str, path: str) -> dict[str, Any]:
    """A completion as the message that it is. It may be empty: that is what the policy said.

    Raises:
        ApiError: `invalid_rollout`.
    """
    message = {"content": completion} if isinstance(completion, str) else dict(completion)
    if message.get("role") is None:
        message["role"] = "assistant"
    if message["role"] != "assistant":
        raise invalid(f"Invalid '{path}.role': a completion is an assistant's message.", f"{path}.role")
    check_depth(message, path)
    empty = {"content": ""} if message.get("content") is None else {}
    try:
        read_message({**message, **empty}, path, ANY)
    except ConfigError as error:
        raise invalid(str(error), error.path or path) from None
    return message


def conversation_of(item: Item, path: str) -> dict[str, Any]:
    """The messages and tools of an item, as trainers take them.

    Raises:
        ApiError: `invalid_rollout`, with the path of the key at fault.
    """
    given = {"messages": item.messages, "tools": item.tools, "functions": item.functions}
    for index, message in enumerate(item.messages):
        check_depth(message, f"{path}.messages[{index}]")
    try:
        read_chat_data(given, ANY, path)
    except ConfigError as error:
        raise invalid(str(error), error.path or path) from None
    return canonical(given)


ANY = Rules()
"""Of data for training: ids of calls may be missing."""


def check_depth(message: Mapping[str, Any], path: str) -> None:
    """Refuse a message that is nested too deeply, also in keys that nobody reads."""
    if too_deep(message):
        raise invalid(f"Invalid '{path}': it is nested more than {MAX_DEPTH} deep.", path)


def group_of(request: StepRequest, live: RolloutSession, batch_id: int, at: float) -> Group:
    """A group for the inbox: each completion that the ledger knows as the tokens that were sampled, else as text.

    Raises:
        ApiError: it cannot be one; nothing was changed.
    """
    credit = live.sampled_at(batch_id)
    rollouts: list[Rollout] = []
    versions: list[int] = []
    used: set[tuple[str, int]] = set()
    for index, (path, items) in enumerate(trajectories(request, live.config.num_generations)):
        nested = isinstance(request.batch[index], list)
        entries = [(f"{path}[{k}]" if nested else path, item) for k, item in enumerate(items)]
        reward, advantage = reward_and_advantage(entries)
        for place, item in entries:
            rollout, version = rollout_of(item, place, live, used)
            versions.append(credit if version is None else version)
            rollouts.append(msgspec.structs.replace(rollout, trajectory=index, reward=reward, advantage=advantage))
    check_alike(rollouts, "batch")
    group = Group(id=batch_id, rollouts=tuple(rollouts), version=min(versions), metrics=numbers(request.metrics), at=at)
    try:
        msgspec.msgpack.encode(group)
    except OverflowError:
        raise invalid("Invalid 'batch': a message holds a whole number of more than 64 bits.", "batch") from None
    return group


def rollout_of(item: Item, path: str, live: RolloutSession, used: set[tuple[str, int]]) -> tuple[Rollout, int | None]:
    """An item as a rollout, and the version that sampled it, where that is known.

    Args:
        used: The completions that the group's other items were matched with; this one's is added.
    """
    answer = answer_of(item.completion, f"{path}.completion")
    conversation = conversation_of(item, path)
    content = answer.get("content")
    if isinstance(content, str) and not answer.get("tool_calls"):
        tools = None if item.tools is None else key_of_tools(item.tools)
        found = live.match(key_of(item.messages, content), frozenset(used), tools)
        if found is not None:
            used.add((found.id, found.index))
            return sampled_rollout(found, live.config.temperature), found.version
    return Rollout(answer=canonical_message(answer), **conversation), None


def sampled_rollout(found: Completion, temperature: float) -> Rollout:
    """A completion as it was sampled. Log-probabilities at another temperature than the job's are of no use."""
    same = abs(found.temperature - temperature) <= SAME_TEMPERATURE
    return Rollout(
        prompt=found.prompt,
        completion=found.tokens,
        logprobs=found.logprobs if same else b"",
        truncated=found.finish == "length",
        completions=(name_of(found.id, found.index),),
    )
