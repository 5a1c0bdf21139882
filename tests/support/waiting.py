"""Waiting for a condition, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
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


async def until_async(condition: Callable[[], Any], seconds: float = 120.0, pause: float = 0.02) -> Any:
    """As `until`, while the event loop goes on; the condition may be a coroutine function."""
    deadline = time.monotonic() + seconds
    while not (value := await found if inspect.isawaitable(found := condition()) else found):
        assert time.monotonic() < deadline, f"the condition did not come true within {seconds:g} s"
        await asyncio.sleep(pause)
    return value
