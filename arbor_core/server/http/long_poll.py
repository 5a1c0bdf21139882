"""Clients that wait for news of a job: however many wait for the same, it is looked at once for all of them.

A plugin's route that waits keeps one `LongPoll` for all its requests, built with `Services.changed`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar

VariantT = TypeVar("VariantT", bound=Hashable)
StateT = TypeVar("StateT")


class Changed(Protocol):
    """`Services.changed`."""

    async def __call__(self, job_id: str, owner: str, seconds: float, after: int | None = None) -> int: ...


class LongPoll(Generic[VariantT, StateT]):
    """The clients that wait.

    Args:
        look: Tells how a job of an owner stands, in one of the variants in which clients see it.
        is_news: Whether clients wait no longer: how the job was, and how it is now.
        changed: Waits until something of the job has changed (`Services.changed`).
        latest: Seconds between two looks at a job of which nothing changes in the database: for what changes elsewhere.
    """

    def __init__(
        self,
        look: Callable[[str, str, VariantT], Awaitable[StateT]],
        is_news: Callable[[StateT, StateT], bool],
        changed: Changed,
        latest: float,
    ) -> None:
        self.look, self.is_news, self.changed, self.latest = look, is_news, changed, latest
        self.watches: dict[tuple[str, str, VariantT], Watch[StateT]] = {}

    async def next(self, job_id: str, owner: str, variant: VariantT, before: StateT, seconds: float) -> StateT | None:
        """The state of a job when there is news; None: there was none within `seconds`.

        Args:
            before: The state that the client knows.

        Raises:
            ApiError: the owner has no such job.
        """
        key, until = (job_id, owner, variant), time.monotonic() + seconds
        watch = self.watches.get(key)
        if watch is None:
            watch = self.watches[key] = Watch(until)
            watch.news = asyncio.create_task(self._news(key, before, watch))
            watch.news.add_done_callback(lambda _: self.watches.pop(key))
            watch.news.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may wait for it
        watch.until = max(watch.until, until)
        found, _ = await asyncio.wait({watch.news}, timeout=seconds)  # which leaves it running for the others
        return watch.news.result() if found else None

    async def _news(self, key: tuple[str, str, VariantT], before: StateT, watch: Watch[StateT]) -> StateT:
        """The next state that is news; the last one looked at, when nobody waits any longer."""
        job_id, owner, variant = key
        number, seconds = None, 0.0  # the first look is at once: there may be news since the client's own
        while True:
            number = await self.changed(job_id, owner, seconds, number)
            found = await self.look(job_id, owner, variant)
            left = watch.until - time.monotonic()
            if self.is_news(before, found) or left <= 0:
                return found
            before, seconds = found, min(self.latest, left)


class Watch(Generic[StateT]):
    """Of one job, for the clients that wait at the same time."""

    news: asyncio.Task[StateT]

    def __init__(self, until: float) -> None:
        self.until = until
        """When the last of them has waited enough."""
