"""Commands that clients send to a trainer while it runs, and its results: numbered, opaque, each answered once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class Command(msgspec.Struct, frozen=True):
    """A command where it stands in the inbox."""

    number: int
    """Of the client's: 1, 2, 3, ... in the order in which commands are executed."""
    payload: bytes
    digest: int
    """Of what the client sent (see `CommandSession.send`)."""
    position: int
    """Of its first byte in the inbox."""


class Result(msgspec.Struct, frozen=True):
    """What the trainer answered to a command."""

    number: int
    """The command's."""
    payload: bytes


class Sent(msgspec.Struct, frozen=True):
    """What became of a command that was sent."""

    number: int
    repeated: bool = False
    """It had come before."""


class CommandSession(Protocol):
    """The commands of one job, as the routes of plugins send them and wait for their results.

    Numbers say the order: the trainer executes 1, 2, 3, ... whatever order they come in, and one that comes early waits
    for those before it. A command that came is on the disk, and executed, though the server or the trainer is killed.
    Its first result stands: a trainer that executes it again, after a crash, does not change what was told.

    A client acknowledges the results that it has got; they are dropped then. So many commands may be unacknowledged,
    and so many bytes of their results, as `WINDOW` and `RESULT_BYTES` of `arbor_core.commands.session` say.
    """

    @property
    def acknowledged(self) -> int:
        """The number up to which results were acknowledged."""
        ...

    @property
    def answered(self) -> int:
        """The number up to which every command has a result, as far as is known."""
        ...

    async def send(self, payload: bytes, number: int, digest: int | None = None) -> Sent:
        """Put a command into the inbox; it is on the disk when this returns. The same again changes nothing.

        Args:
            number: From 1 on, without gaps in the end.
            digest: 64 bits that stand for what the client sent, by which a repetition is known; None: the payload's.

        One that comes just as the job is asked to finish is waited for: until it has its result, or the job has ended
        without it.

        Raises:
            ApiError: 400: the number is none, was used for another command, or was acknowledged already; the job has
                ended or is to finish. 409, with `retry-after`: it is to finish, and may execute the command yet. 429,
                with `retry-after`: too many commands or results wait to be acknowledged.
            OSError: it could not be written.
        """
        ...

    async def result(self, number: int, seconds: float = 0) -> Result | None:
        """The result of a command; waits for it, up to so many seconds. None: there is none yet, or the job has ended
        without it.

        Raises:
            ApiError: 400: it was acknowledged, and may be gone.
        """
        ...

    async def follow(self, after: int, seconds: float = 0) -> Sequence[Result]:
        """The results of the commands `after` + 1, `after` + 2, ... as far as all before them are there, some megabytes
        at a time; waits for the first, up to so many seconds.

        Raises:
            ApiError: 400: the first of them was acknowledged, and may be gone.
        """
        ...

    async def acknowledge(self, up_to: int) -> None:
        """Say that the results up to a number were got: nobody asks for them any more, and they may be dropped. On the
        disk when this returns; a lower number than before changes nothing.

        Raises:
            ApiError: 400: one of them is not there yet.
        """
        ...
