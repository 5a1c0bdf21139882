"""Clients that wait for a change of a job's status: however many wait, the job is looked at once for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from .status import GRPOStatus, Style

LATEST_SECONDS = 0.25
"""Between two looks, if no event of the job comes: a group that another client sends is none."""

Key = tuple[str, str, Style]
"""Job, owner, and how checkpoints are shown."""
Look = Callable[[str, str, Style], Awaitable[GRPOStatus]]
Changed = Callable[[str, str, float], Awaitable[None]]


class StatusWatch:
    """Of one job, for the clients that wait at the same time.

    Args:
        look: Tells how the job is.
        changed: Returns when there is an event of it, or after that many seconds.
        before: The status that they know.
        until: When the last of them has waited enough.
    """

    def __init__(self, look: Look, changed: Changed, key: Key, before: GRPOStatus, until: float) -> None:
        self.look, self.changed, self.key, self.until = look, changed, key, until
        self.change = asyncio.create_task(self._change(before))
        self.change.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody waits for it

    async def _change(self, before: GRPOStatus) -> GRPOStatus:
        """The next state that differs from `before`; the last one looked at, when nobody waits any longer."""
        while (now := time.monotonic()) < self.until:
            job_id, owner, _ = self.key
            await self.changed(job_id, owner, min(LATEST_SECONDS, self.until - now))
            found = await self.look(*self.key)
            if any(getattr(found, name) != getattr(before, name) for name in ("status", "policy_version")):
                return found
            if found.pending_batch_ids != before.pending_batch_ids:
                return found
            before = found
        return before


class StatusPolls:
    """All watches of a server."""

    def __init__(self, look: Look, changed: Changed) -> None:
        self.look, self.changed = look, changed
        self.watches: dict[Key, StatusWatch] = {}

    async def next(self, key: Key, before: GRPOStatus, seconds: float) -> GRPOStatus | None:
        """The state of a job when it is no longer as it was before; None: it was still so after `seconds`.

        Raises:
            ApiError: the owner has no such job.
        """
        until = time.monotonic() + seconds
        watch = self.watches.get(key)
        if watch is None:
            watch = self.watches[key] = StatusWatch(self.look, self.changed, key, before, until)
            watch.change.add_done_callback(lambda _: self.watches.pop(key))
        watch.until = max(watch.until, until)
        found, _ = await asyncio.wait({watch.change}, timeout=seconds)  # which leaves it running for the others
        return watch.change.result() if found else None
