"""Fixtures: a real server, and a plugin made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from disks import mounted
from live import LiveServer, launch

from arbor_core import hookimpl
from arbor_core.plugins import Plugins, new_manager

ROOT = Path(__file__).parents[1]
SLOWEST = (
    "plugins/arbor_grpo/tests/test_train.py",
    "plugins/arbor_sft/tests/test_train.py",
    "tests/process/test_cpu.py",
    "tests/testing/test_conformance.py",
    "tests/system/test_end_to_end.py",
    "tests/inference/test_live_engines.py",
    "tests/commands/test_session_crashes.py",
    "tests/rollouts/test_session_crashes.py",
    "tests/system/test_examples.py",
    "tests/compat/test_old_storage.py",
    "plugins/arbor_transformers/tests/test_backend.py",
    "tests/files/test_uploads_in_parts.py",
    "tests/dispatch/test_state_machine.py",
    "tests/jobdir/test_damaged_checkpoints.py",
    "tests/dispatch/test_lifecycle.py",
    "tests/server/test_security.py",
    "tests/server/test_schemathesis.py",
    "tests/storage/test_storage_faults.py",
    "tests/dispatch/test_hung_trainers.py",
    "tests/dispatch/test_remote_attempts.py",
    "tests/dispatch/test_lost_devices.py",
    "tests/worker/test_launchers.py",
    "tests/system/test_packages.py",
    "tests/system/test_docs.py",
    "plugins/arbor_grpo/tests/test_replay.py",
    "plugins/arbor_grpo/tests/test_routes_hanging.py",
    "tests/system/test_crash_matrix.py",
)
"""Files that take over half a minute, the slowest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: no worker is left alone with one in the end."""
    rank = {ROOT / path: place for place, path in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """`start_server("start=cold", mock=False)` starts a server of the test's own; every one is ended."""
    servers: list[LiveServer] = []

    def start(*overrides: str, storage: Path | None = None, **options: Any) -> LiveServer:
        servers.append(launch(storage or tmp_path, *overrides, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server with the mock trainer, engine and devices, for all tests that do not break it."""
    live = launch(tmp_path_factory.mktemp("server"))
    yield live
    live.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    with mounted(tmp_path / "disk", 24) as folder:
        yield folder


@pytest.fixture
def chat_rows() -> list[dict[str, Any]]:
    """Twelve rows that supervised fine-tuning accepts."""
    return [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
        for n in range(12)
    ]


@pytest.fixture
def plugins() -> Plugins:
    """The hooks and no plugin: entry points are not read."""
    return Plugins(new_manager())


@pytest.fixture
def plugin(plugins: Plugins) -> Callable[..., None]:
    """`plugin("acme 1.0", arbor_trainers=lambda: {...})` registers a plugin with these hooks."""

    def register(name: str, **hooks: Callable[..., Any]) -> None:
        module = SimpleNamespace(**{hook: hookimpl(function) for hook, function in hooks.items()})
        plugins.manager.register(module, name=name)

    return register
