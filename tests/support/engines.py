"""Engine processes: using one for a moment, and what it has loaded."""

from __future__ import annotations

import aiohttp

from arbor_core import Engine
from arbor_core.engine import EngineProcess
from arbor_core.inference.engines import Engines
from arbor_core.models.fine_tuned import Resolved


async def used(engines: Engines, resolved: Resolved) -> EngineProcess:
    """Use a model for a moment."""
    async with engines.using(resolved) as engine:
        assert isinstance(engine, EngineProcess)
        assert await engine.health()
        return engine


async def loaded(engine: Engine) -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(f"{engine.url}/health") as answer:
        return list((await answer.json())["adapters"])
