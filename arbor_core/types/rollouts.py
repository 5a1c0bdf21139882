"""Learning from rollouts: what the server must know of a trainer, and what a step was made of."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class RolloutConfig(Struct, frozen=True, kw_only=True):
    """What the server must know of a trainer that learns from rollouts. Part of its configuration."""

    num_generations: Annotated[int, Meta(ge=2, le=1024)]
    """Rollouts of a group that a client sends whole."""
    groups_per_step: Annotated[int, Meta(ge=1, le=4096)]
    """Groups of a batch, which a trainer makes one or several optimizer steps of."""
    max_staleness: Annotated[int, Meta(ge=0, le=64)]
    """Batches that a group may be older than the policy it trains: 0 is strictly on policy, 1 lets clients sample while
    a batch is trained. Clients are offered credits for so many."""
    too_stale: Annotated[int, Meta(ge=0)] | None
    """Groups that are more batches older are skipped; None: as `max_staleness` says. More lets clients that sample
    ahead of their credits train on older groups."""
    temperature: Annotated[float, Meta(gt=0, le=2)]
    """What rollouts are sampled at."""
    offer_seconds: Annotated[float, Meta(gt=0)]
    """A batch id that no group came for in so long is withdrawn, and a new one offered."""


class Fed(Struct, frozen=True):
    """What one step took from the inbox: enough to see later whether it is still the same."""

    end: int
    """Position up to which the inbox was used."""
    groups: tuple[tuple[int, int], ...]
    """Position and CRC-32 of each group that was trained on."""
    skipped: tuple[int, ...] = ()
    """Positions of groups that were too old or could not be used."""
