"""The application on its socket: what uvicorn is told, and how the server ends."""

from __future__ import annotations

import asyncio
import gc
import math
import socket

import uvicorn
from litestar.types import ASGIApp

from arbor_core.config import LimitsConfig

from .connection import PromptProtocol
from .ending import Ending

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (5 to 60), so that a request is never
sent into a connection that is being closed."""
LAST_WORDS = 5
"""Seconds in which clients must take what they are told at the end."""


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then requests under way may go on for a while (`limits.shutdown_seconds`).

    Args:
        listener: A socket that listens.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, limits: LimitsConfig) -> None:
        self.ending, self.listener, self.grace = Ending(app), listener, limits.shutdown_seconds
        super().__init__(
            uvicorn.Config(
                self.ending,
                http=type("Connection", (PromptProtocol,), {"seconds": limits.head_seconds}),
                log_level="warning",
                lifespan="on",
                timeout_graceful_shutdown=math.ceil(self.grace) + LAST_WORDS,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                h11_max_incomplete_event_size=65536,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            gc.freeze()  # what is here now stays: looking through it again would hold up every request
            host, port = self.listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"arbor: listening on http://{shown}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        over = asyncio.get_running_loop().call_later(self.grace, self.ending.end)
        try:
            await super().shutdown(sockets)
        finally:
            over.cancel()
