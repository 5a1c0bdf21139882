"""Wake-up sockets: datagrams that tell a waiting process that something was written. Their files are named `bell`.

A wake-up is a hint and may get lost; the listener polls once a second as well. It saves the wait: 0.3 ms a hop instead
of 66 ms with 100 ms polling.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

URGENT = "!"
"""After a job's id: clients wait for what was written."""
ANSWERED = "?"
"""After a job's id: its trainer has written a result of a command."""
MAX_ADDRESS_BYTES = 100
"""A socket address holds a path of 108 bytes."""


class WakeupSocket:
    """The listener's end, in an event loop."""

    def __init__(self, path: Path, on_wake: Callable[[str], None]) -> None:
        """Call `on_wake` with each message: a job's id, possibly followed by `URGENT`. Equal messages that arrive
        together count as one."""
        self.path, self.on_wake = path, on_wake
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with short_address(path) as address:
            self.socket.bind(address)
        asyncio.get_running_loop().add_reader(self.socket, self._receive)

    def _receive(self) -> None:
        messages = set()
        with contextlib.suppress(BlockingIOError):
            while datagram := self.socket.recv(256):
                messages.add(datagram.decode(errors="replace"))
        for message in messages:
            self.on_wake(message)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.socket)
        self.socket.close()
        self.path.unlink(missing_ok=True)


def wake(path: str | Path | None, message: str) -> None:
    """Tell the listener at `path` that something was written; `message` is a job's id. No listener: nothing happens."""
    if not path:
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, kind) as sender,
        short_address(Path(path)) as address,
    ):
        sender.sendto(message.encode(), address)


class short_address(contextlib.AbstractContextManager[str]):  # noqa: N801 - reads as a function
    """The address of a socket at `path`, within the bytes that an address may have, however deep its folder is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def __enter__(self) -> str:
        if len(os.fsencode(self.path)) < MAX_ADDRESS_BYTES:
            return str(self.path)
        self.handle = os.open(self.path.parent, os.O_RDONLY)
        return f"/proc/self/fd/{self.handle}/{self.path.name}"

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            os.close(self.handle)
