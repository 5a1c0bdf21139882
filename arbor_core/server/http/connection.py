"""One client's connection: uvicorn's HTTP/1.1, which has no bound on how long a request's head may take."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from arbor_core import ids
from arbor_core.types import NO_RETRY, ApiError

from .errors import envelope


class PromptProtocol(H11Protocol):
    """Closes a connection on which no whole head has come in time: since it was made, or since the first byte after an
    answer. Between an answer and that byte it is idle, and uvicorn's `timeout_keep_alive` counts.

    It is h11's, whatever else is installed, because h11 bounds the size of a head.
    """

    seconds: ClassVar[float]
    """How long a head may take."""
    _over: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asked or self.transport.is_closing():
            self._expect_nothing()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    @property
    def _asked(self) -> bool:
        """Whether a request is under way, so that it is not the head that is waited for."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._over is None:
            self._over = self.loop.call_later(self.seconds, self._give_up)

    def _expect_nothing(self) -> None:
        if self._over is not None:
            self._over.cancel()
            self._over = None

    def _give_up(self) -> None:
        """Close; half a head is answered, but not silence, nor the rest of a request that has its answer."""
        if self._asked or self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self.transport.write(too_late(self.seconds))
        self.transport.close()


def too_late(seconds: float) -> bytes:
    """The answer to a request that nobody could read yet, as it goes over the wire."""
    message = f"The head of the request did not come within {seconds:g} seconds (limits.head_seconds)."
    body = envelope(ApiError(408, message, "request_timeout"))
    lines = [
        "HTTP/1.1 408 Request Timeout",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-request-id: {ids.new('req_')}",
        *(f"{name}: {value}" for name, value in NO_RETRY.items()),
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
