"""The end of a server: what is still under way when its time is over is told so, and not cut off without a word."""

from __future__ import annotations

import asyncio
from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from .errors import ApiError, envelope, request_id


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

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        if scope["type"] != ScopeType.HTTP or task is None:  # the application's own life is not a request
            return await self.app(scope, receive, send)
        self.under_way.add(task)
        try:
            await self.app(scope, receive, noted)
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


def shutting_down() -> ApiError:
    """Row 114: the next server answers."""
    message = "The server is shutting down. Repeat the request when it is there again."
    return ApiError(503, message, "server_shutting_down", headers={"retry-after": "10"})


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
