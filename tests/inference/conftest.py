"""Fixtures: the engines of a server, real processes of the mock plugin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from arbor_core import AllocatorSettings
from arbor_core.config.compose import defaults
from arbor_core.config.convert import merged
from arbor_core.inference.engines import Engines
from arbor_core.models.fine_tuned import Resolved


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return defaults("backend", "mock")


@pytest.fixture
async def make(tmp_path: Path, options: dict[str, Any]) -> AsyncIterator[Callable[..., Engines]]:
    """`make(devices=2, load_seconds=1.0)`: the engines of a server with this number of devices to serve from."""
    arbor_mock = pytest.importorskip("arbor_mock")
    made: list[Engines] = []

    def engines(
        devices: int = 1,
        idle_seconds: float = 60.0,
        hang_seconds: float = 60.0,
        load_wait: float = 60.0,
        newest: Callable[[str], Resolved | None] = lambda _: None,
        **values: Any,
    ) -> Engines:
        allocator = arbor_mock.simulated_devices(AllocatorSettings([], list(range(devices))))
        made.append(
            Engines(
                arbor_mock.MockBackend(),
                allocator,
                tmp_path / "engines",
                newest,
                options=merged(options, values),
                threads=1,
                idle_seconds=idle_seconds,
                hang_seconds=hang_seconds,
                load_wait=load_wait,
            )
        )
        return made[-1]

    yield engines
    for each in made:
        await each.close()
