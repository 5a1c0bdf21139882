"""Running an attempt of a job: what is started where, and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from msgspec import Struct

from .devices import Device


class Placement(Struct, frozen=True):
    """Where an attempt runs: the devices of each rank, and how many CPU threads a rank may use."""

    devices: tuple[Device, ...]
    threads: int
    micro_batch_share: float = 1.0
    """How large micro-batches should be, in parts of what they would be: less than 1 where the job did not fit."""


class AttemptOrder(Struct, frozen=True):
    """`attempts/<n>/order.json`: what the supervisor of one attempt starts, and what the installation that starts it
    decides."""

    dir: Path
    """The attempt's directory; the processes start in it."""
    argv: tuple[str, ...]
    """The command for a cold start; empty: the trainer runs in the supervisor's child itself."""
    env: dict[str, str]
    """Variables beside those that every attempt gets. They must be set before any library is imported."""
    python: str
    entry: str = ""
    """`"package.module:function"` of the trainer."""
    config_type: str = ""
    """`"package.module:Struct"` of its configuration."""
    base: str | None = None
    """Directory or hub id of the base model; None: the job starts from weights in its storage directory."""
    preload: tuple[str, ...] = ()
    prove: str | None = None
    start: str = "cold"
    """`warm` (forked from a process that has imported the libraries) or `cold`."""
    grace: float = 30.0
    """Seconds between SIGTERM and SIGKILL."""
    bell: str | None = None
    """Socket on which the attempt tells its server that it has written something (`process/wakeup.py`)."""
    room_seconds: float = 60.0
    """How long a checkpoint waits for room on a full disk before the job is paused."""
    handled: int = 0
    """Groups of rollouts that earlier attempts have handled."""


class Exit(Struct, frozen=True):
    """`attempts/<n>/exit.json`: how the attempt's process ended. Written by the supervisor, by nobody else."""

    code: int
    """Exit status; negative: the signal that ended it."""
    at: float


class Executor(Protocol):
    """Starts attempts and finds them again. A ref is opaque text that outlives the server."""

    def prepare(self, python: str | None, preload: tuple[str, ...], prove: str | None) -> None:
        """An attempt of such a trainer may come soon: get ready without waiting. May do nothing."""
        ...

    async def start(self, order: AttemptOrder, placement: Placement) -> str: ...

    def poll(self, ref: str) -> bool:
        """Whether the attempt's supervisor lives."""
        ...

    def signal(self, ref: str, number: int) -> None:
        """Send a signal to the attempt; nothing happens if it has ended."""
        ...

    def adopt(self, ref: str) -> bool:
        """Take over an attempt started by an earlier server; False if it does not live."""
        ...

    async def close(self) -> None:
        """Leave attempts running and free what only this server needs (fork servers)."""
        ...
