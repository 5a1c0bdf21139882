"""Running an attempt of a job: what is started where, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from .devices import Device


class Placement(Struct, frozen=True):
    """Where an attempt runs: the devices of each rank, all on one node, and how many CPU threads a rank may use."""

    devices: tuple[Device, ...]
    threads: int
    micro_batch_share: float = 1.0
    """How large micro-batches should be, in parts of what they would be: less than 1 where the job did not fit."""

    @property
    def node(self) -> str:
        """The node that the devices are on; empty: the server's machine."""
        return self.devices[0].node if self.devices else ""


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
    sender: str = ""
    """`"package.module:function"` that makes the `Sender` of the engines of the job's model; empty: files."""


class Exit(Struct, frozen=True):
    """`attempts/<n>/exit.json`: how the attempt's process ended. Written by the supervisor, by nobody else."""

    code: int
    """Exit status; negative: the signal that ended it."""
    at: float


class Executor(Protocol):
    """Starts attempts, says which of them live, and ends them, on whatever machine they run. Nobody else looks at their
    processes, at who has claimed them, or at their heartbeats.

    A ref is opaque text that names an attempt's run for good: attempts outlive the server, and the next one has nothing
    but refs and directories. An OSError of any of these calls says that something cannot be known or done now (a
    machine does not answer, say): nothing is concluded from it, and the server asks again.
    """

    def prepare(self, python: str | None, preload: tuple[str, ...], prove: str | None) -> None:
        """An attempt of such a trainer may come soon: get ready without waiting. May do nothing."""
        ...

    async def start(self, order: AttemptOrder, placement: Placement) -> str:
        """Start an attempt whose directory holds its documents; returns its ref. Started twice, it runs once. May take
        long: the call is cancelled with the job, and `adopt` is asked whether the attempt has begun.

        Raises:
            ArborError: this executor does not reach the node of the devices.
        """
        ...

    async def poll(self, attempts: Mapping[str, Path]) -> Mapping[str, str | None]:
        """Which attempts live: asked once a second, about all that run. What is written here stays on the server's
        machine: an executor whose attempts write elsewhere has brought their files here before it says that one has
        ended.

        Args:
            attempts: Their directories, by their refs; refs of other executors do not live.

        Returns:
            By the refs of those that live, a text that changes whenever training makes progress; None before the first
            time. An attempt that cannot be seen for a moment keeps its last one: it hangs if that takes too long.
        """
        ...

    async def signal(self, ref: str, number: int) -> None:
        """Send a signal to the attempt's supervisor; nothing happens if it has ended."""
        ...

    async def adopt(self, attempt_dir: Path) -> str | None:
        """The ref of who runs the attempt, or ran it: the server may have died before it could write the ref down. If
        nobody has begun it, nobody ever will from now on, not even a start that is still on its way; then None."""
        ...

    async def end(self, ref: str) -> None:
        """Kill whatever lives of an attempt, its supervisor included or long gone; returns when nothing does.

        Raises:
            TimeoutError: something does not end. It may still hold a device.
        """
        ...

    async def close(self) -> None:
        """Leave attempts running and free what only this server needs (fork servers)."""
        ...
