"""What one request's generations have produced and its connection has not yet sent."""

import asyncio

from arbor_transformers.generation.sequence import Delta


class DeltaQueue:
    """Filled by the generation loop, emptied by a connection, both in the event loop's thread.

    Args:
        limit: Deltas it may hold; with one more the reader is too slow (row 129).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.deltas: list[Delta] = []
        self.filled, self.overrun = asyncio.Event(), asyncio.Event()

    def put(self, delta: Delta) -> None:
        if len(self.deltas) >= self.limit:
            self.overrun.set()
            return
        self.deltas.append(delta)
        self.filled.set()

    async def take(self) -> list[Delta]:
        """Everything in it; waits until there is something."""
        await self.filled.wait()
        self.filled.clear()
        deltas, self.deltas = self.deltas, []
        return deltas
