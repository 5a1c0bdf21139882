"""Waiting for a job to change."""

from __future__ import annotations

import asyncio


class Subscriptions:
    """Who waits for a change of a job. For the event loop's thread alone."""

    def __init__(self) -> None:
        self.waiting: dict[str, set[asyncio.Future[None]]] = {}
        """By job id."""

    def notify(self, job_id: str) -> None:
        """Wake those who wait: the job's row, its events or its policy changed."""
        for future in self.waiting.pop(job_id, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, job_id: str, seconds: float) -> None:
        """Return at the next change, or after `seconds`."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(job_id, set()).add(future)
        try:
            await asyncio.wait({future}, timeout=seconds)
        finally:
            if others := self.waiting.get(job_id):
                others.discard(future)
                if not others:
                    del self.waiting[job_id]
