"""Engines that hang: they show no sign of life, and are ended."""

from __future__ import annotations

import asyncio
import logging

from arbor_core.types import Engine

log = logging.getLogger(__name__)

CHECKS = 4
"""An engine hangs when it shows no sign of life in this number of checks in a row."""


async def kill_when_it_hangs(model: str, engine: Engine, seconds: float) -> None:
    """End an engine as soon as it hangs."""
    how = await hanging(engine, seconds)
    log.warning("engine of %s %s for %g s and is killed", model, how, seconds)
    await engine.kill()


async def hanging(engine: Engine, seconds: float) -> str:
    """Return when an engine has shown no sign of life for `seconds`; the text says which one was missed.

    Checks are counted and no clocks compared: after this server or the machine stood still, no engine is to blame.
    """
    pause, missed = seconds / CHECKS, 0
    while True:
        stalled, _ = await asyncio.gather(engine.stalled_for(pause), asyncio.sleep(pause))
        missed = missed + 1 if stalled is None or stalled >= pause else 0
        if missed == CHECKS:
            return "does not answer" if stalled is None else "makes no progress with its work"
