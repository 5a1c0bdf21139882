"""A bell: a datagram socket that wakes whoever waits for something to be written.

Ringing is a hint and may get lost; the listener polls once a second besides. It saves the wait: 0.3 ms a hop instead
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


class Bell:
    """The listener's end, in an event loop."""

    def __init__(self, path: Path, on_ring: Callable[[str], None]) -> None:
        """Call `on_ring` with the id of the job that rang."""
        self.path, self.on_ring = path, on_ring
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with short(path) as address:
            self.socket.bind(address)
        asyncio.get_running_loop().add_reader(self.socket, self._rung)

    def _rung(self) -> None:
        rang = set()
        with contextlib.suppress(BlockingIOError):
            while said := self.socket.recv(256):
                rang.add(said.decode(errors="replace"))
        for job_id in rang:
            self.on_ring(job_id)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.socket)
        self.socket.close()
        self.path.unlink(missing_ok=True)


def ring(path: str | Path | None, job_id: str) -> None:
    """Say that a job has written something, if somebody listens."""
    if not path:
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as bell, short(Path(path)) as address:
        bell.sendto(job_id.encode(), address)


class short(contextlib.AbstractContextManager[str]):  # noqa: N801 - reads as a function
    """A socket's path within the 108 bytes that a socket address holds, however deep the folder is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def __enter__(self) -> str:
        if len(os.fsencode(self.path)) < 100:
            return str(self.path)
        self.handle = os.open(self.path.parent, os.O_RDONLY)
        return f"/proc/self/fd/{self.handle}/{self.path.name}"

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            os.close(self.handle)
