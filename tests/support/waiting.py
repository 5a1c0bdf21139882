"""Waiting for a condition, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 120.0, pause: float = 0.02) -> Any:
    """The first true value of a condition.

    Raises:
        AssertionError: there was none within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"the condition did not come true within {seconds:g} s"
        time.sleep(pause)
    return value


def state_of(pid: int) -> str:
    """The state of a process, as /proc has it: `T` stands still, `Z` has ended and was not waited for; empty: it is
    gone, perhaps while this looked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def has_ended(pid: int) -> bool:
    """Whether a process runs no more, whether or not anybody has waited for it."""
    return state_of(pid) in ("", "Z", "X")


async def until_async(condition: Callable[[], Any], seconds: float = 120.0, pause: float = 0.02) -> Any:
    """As `until`, while the event loop goes on; the condition may be a coroutine function."""
    deadline = time.monotonic() + seconds
    while not (value := await found if inspect.isawaitable(found := condition()) else found):
        assert time.monotonic() < deadline, f"the condition did not come true within {seconds:g} s"
        await asyncio.sleep(pause)
    return value
