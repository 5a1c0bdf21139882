"""Server-sent events: what a stream of them looks like on the wire."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from litestar.types import Send

from arbor_core.types import ApiError

from .errors import envelope

PING_SECONDS = 15.0
"""A stream that is silent for this long gets a comment, so that nothing between us and the client gives it up."""
DONE = b"data: [DONE]\n\n"
Header = tuple[bytes, bytes]


class Events:
    """The client's end of a stream of server-sent events. An event is sent as a whole or not at all."""

    def __init__(self, send: Send, headers: Sequence[Header] = ()) -> None:
        self.send, self.headers = send, headers
        self.opened = False
        self.begun = False
        """Whether an event, not only a comment, was sent."""
        self.held = b""
        self.sent_at = time.monotonic()

    async def open(self) -> None:
        self.opened = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *self.headers,
        ]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, chunk: bytes) -> None:
        """Pass on what has come; the beginning of an event is held until its end has come too."""
        if self.held:
            chunk = self.held + chunk
        if chunk.endswith(b"\n\n"):
            self.held = b""
        else:
            end = chunk.rfind(b"\n\n") + 2 if b"\n\n" in chunk else 0
            chunk, self.held = chunk[:end], chunk[end:]
        if chunk:
            self.begun = True
            await self._send(chunk)

    async def _send(self, chunk: bytes) -> None:
        if not self.opened:
            await self.open()
        self.sent_at = time.monotonic()
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def keep_alive(self) -> None:
        """Send a comment whenever nothing was sent for a while; opens the stream if need be."""
        while True:
            silence = time.monotonic() - self.sent_at
            if silence >= PING_SECONDS:
                await self._send(b": ping\n\n")
                silence = 0.0
            await asyncio.sleep(PING_SECONDS - silence)

    async def fail(self, error: ApiError) -> None:
        """Say why the stream ends; what was held of an event is lost."""
        await self._send(b"data: " + envelope(error) + b"\n\n" + DONE)

    async def close(self) -> None:
        if not self.opened:
            await self.open()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})
