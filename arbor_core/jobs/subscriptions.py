"""Waiting for something to happen to a job."""

from __future__ import annotations

import asyncio


class Subscriptions:
    """Who waits, by job. For the event loop's thread alone."""

    def __init__(self) -> None:
        self.waiting: dict[str, set[asyncio.Future[None]]] = {}

    def notify(self, job_id: str) -> None:
        """Wake who waits: the job's row, its events or its policy are others now."""
        for future in self.waiting.pop(job_id, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, job_id: str, seconds: float) -> None:
        """Return at the next change, or after so many seconds."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(job_id, set()).add(future)
        try:
            await asyncio.wait({future}, timeout=seconds)
        finally:
            if there := self.waiting.get(job_id):
                there.discard(future)
                if not there:
                    del self.waiting[job_id]
