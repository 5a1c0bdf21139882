"""Fixtures: the engines of a server, real processes of the mock plugin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from arbor_core import AllocatorSettings
from arbor_core.config.compose import defaults
from arbor_core.config.convert import merged
from arbor_core.inference.adapters import Newest
from arbor_core.inference.backends import Backend, Backends
from arbor_core.inference.engines import Engines


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return defaults("backend", "mock")


@pytest.fixture
async def make(tmp_path: Path, options: dict[str, Any]) -> AsyncIterator[Callable[..., Engines]]:
    """`make(devices=2, load_seconds=1.0)`: the engines of a server with this number of devices to serve from. `wanted`
    is the operator's `inference.replicas`; `devices` of one engine is `options["devices"]`."""
    arbor_mock = pytest.importorskip("arbor_mock")
    made: list[Engines] = []

    def engines(
        devices: int = 1,
        idle_seconds: float = 60.0,
        hang_seconds: float = 60.0,
        load_wait: float = 60.0,
        newest: Newest = lambda _: None,
        wanted: Mapping[str, int] = {},
        **values: Any,
    ) -> Engines:
        allocator = arbor_mock.simulated_devices(AllocatorSettings([], list(range(devices))))
        made.append(
            Engines(
                Backends(Backend("mock", arbor_mock.MockBackend(), merged(options, values)), {}, {}, wanted),
                allocator,
                tmp_path / "engines",
                newest,
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
