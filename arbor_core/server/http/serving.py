"""The application on its socket: uvicorn's settings, and how the server ends."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
from typing import Any

import uvicorn
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from arbor_core.config.settings import LimitsConfig

from .connection import PromptProtocol
from .errors import envelope, request_id, shutting_down

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (5 to 60), so that a request is never
sent into a connection that is being closed."""
LAST_EVENT_SECONDS = 5
"""Seconds in which clients must take the error that ends their request."""


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
                timeout_graceful_shutdown=math.ceil(self.grace) + LAST_EVENT_SECONDS,
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

    def give_up(self) -> None:
        """Shut down soon, as after SIGTERM."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        over = asyncio.get_running_loop().call_later(self.grace, self.ending.end)
        try:
            await super().shutdown(sockets)
        finally:
            over.cancel()


class Ending:
    """An ASGI application around another one that knows the requests under way.

    Args:
        app: The application that answers them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.over = app, False
        self.under_way: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, task = False, asyncio.current_task()

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        if scope["type"] != ScopeType.HTTP or task is None:  # the lifespan of the application is not a request
            return await self.app(scope, receive, send)
        self.under_way.add(task)
        try:
            await self.app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if not self.over:
                raise
            if not begun:
                await refuse(scope, send)
        finally:
            self.under_way.discard(task)

    def end(self) -> None:
        """End all requests: those that were not answered yet get an error, and a stream has it in its last event."""
        self.over = True
        for task in self.under_way:
            task.cancel()


async def refuse(scope: HTTPScope, send: Send) -> None:
    """Answer a request that is given up, without the application, which was interrupted in it."""
    raw, error = envelope(shutting_down()), shutting_down()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(raw)),
        "x-request-id": request_id(scope),
        **error.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": raw, "more_body": False})
