"""Devices for engines: an engine that is needed makes idle ones end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from arbor_core.types import Allocator, Claim, Lease, free_by_node, placements

POLL_SECONDS = 0.5
"""How often a start that waits for a device looks for an idle engine."""


async def lease(
    allocator: Allocator, claim: Claim, end_idle: Callable[[], Awaitable[None]], released: asyncio.Event
) -> Lease:
    """Devices for an engine, which is waited for.

    Args:
        end_idle: Ends the engine that nobody has used for longest, if one is idle.
        released: Is set when an engine has ended, or is not used any more.

    Raises:
        ArborError: this machine has no such devices to serve from.
    """
    waiting = asyncio.ensure_future(allocator.acquire(claim))
    try:
        await asyncio.wait({waiting}, timeout=0)
        while not waiting.done():
            released.clear()
            if not fits(allocator, claim):
                await end_idle()
            changed = asyncio.ensure_future(released.wait())
            await asyncio.wait({waiting, changed}, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        return await waiting
    except asyncio.CancelledError:
        give_up(allocator, waiting)
        raise


async def lease_at_once(allocator: Allocator, claim: Claim) -> Lease | None:
    """Devices for an engine, if they are free; None: they are not.

    Raises:
        ArborError: this machine has no such devices to serve from.
    """
    waiting = asyncio.ensure_future(allocator.acquire(claim))
    try:
        await asyncio.wait({waiting}, timeout=0)
        if waiting.done():
            return await waiting
    except asyncio.CancelledError:
        give_up(allocator, waiting)
        raise
    give_up(allocator, waiting)
    return None


def give_up(allocator: Allocator, waiting: asyncio.Future[Lease]) -> None:
    """Wait for devices no longer; those that were granted meanwhile are given back."""
    if not waiting.cancel() and not waiting.cancelled() and not waiting.exception():
        allocator.release(waiting.result())


def fits(allocator: Allocator, claim: Claim) -> bool:
    """Whether enough whole devices are free for a claim."""
    free = {(pool, node): n for pool, nodes in free_by_node(allocator).items() for node, n in nodes.items()}
    return next(placements(claim, free), None) is not None
