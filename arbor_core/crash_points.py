"""Fault points: named places between two side effects where a test lets a process die as if the power had failed.

`ARBOR_CRASH_AT=name` ends the server with SIGKILL when it comes to that place, `name:3` when it comes there the third
time. `ARBOR_CRASH_BELOW=name` is for the processes that the server starts (template, supervisor, worker); with
`ARBOR_CRASH_ONCE=<file>` only the first of them dies, which makes the file. Without all that a fault point costs one
comparison.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

_name, _, _count = os.environ.get("ARBOR_CRASH_AT", "").partition(":")
_left = int(_count or 1)


def crash_point(name: str) -> None:
    """Die here, if the environment says so."""
    if name == _name:
        _arrive()


def below(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that the server starts."""
    passed = {key: value for key, value in env.items() if key not in ("ARBOR_CRASH_AT", "ARBOR_CRASH_BELOW")}
    return {**passed, "ARBOR_CRASH_AT": env["ARBOR_CRASH_BELOW"]} if "ARBOR_CRASH_BELOW" in env else passed


def _arrive() -> None:
    global _left  # noqa: PLW0603 - a count of this process
    _left -= 1
    if _left == 0 and _first():
        os.kill(os.getpid(), signal.SIGKILL)


def _first() -> bool:
    """Whether no other process has died here yet."""
    once = os.environ.get("ARBOR_CRASH_ONCE")
    if not once:
        return True
    try:
        Path(once).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
