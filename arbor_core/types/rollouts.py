"""Learning from rollouts: what the server must know of a trainer, and what a step was made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, Struct


class RolloutConfig(Struct, frozen=True, kw_only=True):
    """What the server must know of a trainer that learns from rollouts. Part of its configuration."""

    former_keys: ClassVar[Mapping[str, str]] = {"too_stale": "max_group_age"}
    """Names that keys had in earlier versions: still read, with a warning (`arbor_core.config.convert.renamed`)."""

    num_generations: Annotated[int, Meta(ge=2, le=1024)]
    """Rollouts of a group that a client sends whole."""
    groups_per_step: Annotated[int, Meta(ge=1, le=4096)]
    """Groups of a batch, which a trainer makes one or several optimizer steps of."""
    max_staleness: Annotated[int, Meta(ge=0, le=64)]
    """Batches that a group may be older than the policy it trains: 0 is strictly on policy, 1 lets clients sample while
    a batch is trained. Clients are offered credits for so many."""
    max_group_age: Annotated[int, Meta(ge=0)] | None
    """Groups that are more batches older than the policy are skipped; None: as `max_staleness` says. More lets clients
    that sample ahead of their credits train on older groups."""
    temperature: Annotated[float, Meta(gt=0, le=2)]
    """What rollouts are sampled at."""
    offer_seconds: Annotated[float, Meta(gt=0)]
    """A batch id that no group came for in so long is withdrawn, and a new one offered."""


class StepInputs(Struct, frozen=True):
    """What one step took from the inbox: enough to see later whether it is still the same."""

    end: int
    """Position up to which the inbox was used."""
    groups: tuple[tuple[int, int], ...]
    """Position and CRC-32 of each group that was trained on."""
    skipped: tuple[int, ...] = ()
    """Positions of groups that were too old or could not be used."""


UNNUMBERED = -1
"""Batch id of a group that its sender gave none."""


class Rollout(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One sequence to learn from: as the tokens that were sampled, or as text that the trainer tokenises.

    Tokens are little-endian int32, log-probabilities little-endian float32. A trajectory of several turns is one
    rollout where each prompt extends what came before, else several that share `trajectory`.
    """

    trajectory: int = 0
    """Which of the group's trajectories it belongs to. All rollouts of one carry the same reward and advantage."""
    reward: float | None = None
    advantage: float | None = None
    """Set by the client; None: computed from the rewards of the group."""
    prompt: bytes = b""
    completion: bytes = b""
    logprobs: bytes = b""
    """The sampler's, after temperature and before truncation; one per completion token, 0 where the mask is. Empty: not
    known."""
    mask: bytes = b""
    """One byte per completion token: 1 where the policy sampled it, 0 where the environment wrote it. Empty: all 1."""
    messages: list[dict[str, Any]] | None = None
    """The prompt as messages, where the tokens are not known."""
    answer: dict[str, Any] | None = None
    """The completion as a message, where the tokens are not known."""
    tools: list[dict[str, Any]] | None = None
    truncated: bool = False
    """It ended because it was long enough."""
    completions: tuple[str, ...] = ()
    """Ids of the chat completions it was made of."""


class Group(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Rollouts whose rewards are compared with each other."""

    id: int = UNNUMBERED
    """Batch id: the credit it used up."""
    rollouts: tuple[Rollout, ...]
    version: int
    """Oldest policy version that sampled any of it."""
    label: str | None = None
    """The client's name for it."""
    metrics: dict[str, float] = {}
    """What the client measured meanwhile; shown among the step's metrics."""
    at: float = 0.0
    """When it arrived, in seconds since the epoch."""


class Record(msgspec.Struct, frozen=True):
    """A group where it stands in the inbox."""

    start: int
    """Position of its first byte."""
    end: int
    """Position that follows it."""
    crc: int
    digest: int
    """Of what the client sent (see `Inbox.append`)."""
    group: Group


class Scored(msgspec.Struct, frozen=True):
    """What a trainer made of one rollout."""

    advantage: float | None = None
    """None: it computed none, and the client's counts if there is one."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """Of rollouts that came as text; those of others are known."""


class Completion(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One choice of a chat completion. Tokens are little-endian int32, log-probabilities little-endian float32."""

    id: str
    index: int = 0
    version: int
    """Policy version that sampled it; the oldest one where weights changed meanwhile."""
    prompt: bytes
    tokens: bytes
    logprobs: bytes
    """After temperature, before truncation. Empty: the engine could not tell."""
    temperature: float
    finish: str = "stop"
    key: bytes
    """See `key_of`."""
    toolset: bytes = b""
    """See `key_of_tools`; empty: it was asked for with none. Older records have a `tools` of another type."""


def name_of(id: str, index: int) -> str:
    """A choice of a completion as a rollout names it."""
    return f"{id}#{index}" if index else id


def reference(name: str) -> tuple[str, int]:
    """What `name_of` was made of."""
    id, _, index = name.partition("#")  # noqa: A001
    return id, int(index or 0)


class Policy(msgspec.Struct, frozen=True):
    """What the trainer of a job has published and handled, as its events say."""

    version: int = 0
    """Optimizer steps behind the weights that new completions are sampled from."""
    handled: int = 0
    """Groups that were trained on or skipped."""


class Accepted(msgspec.Struct, frozen=True):
    """What became of a group that was sent."""

    id: int
    position: int
    """Where it begins in the inbox."""
    repeated: bool = False
    """It had come before."""
