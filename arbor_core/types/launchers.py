"""Starting the ranks of a job with several devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import Struct


class RanksCommand(Struct, frozen=True):
    """A command that starts several processes alike. What each of them runs is put after `argv`."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    """Variables beside those that every attempt gets."""


@dataclass(frozen=True)
class Launcher:
    """Who starts the ranks of a job with several devices.

    Args:
        options: Struct of its options; the defaults are in `conf/launcher/<name>.yaml`, beside the key `name`.
        command: Called before each attempt of such a job with the options, the interpreter that has the trainer's
            libraries, and the number of ranks. Returns what starts that many processes, each with RANK, LOCAL_RANK and
            WORLD_SIZE in its environment, and ends when they have ended, with a status other than 0 if one of them
            failed; it ends them on SIGTERM. None: one process uses all devices.
    """

    options: type[Struct]
    command: Callable[[Any, str, int], RanksCommand | None]
