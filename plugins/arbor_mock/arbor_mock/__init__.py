"""Arbor without a GPU: a simulated trainer, engine and allocator behind the real routes, directories and events.

`ARBOR_MOCK_GPU=1 arbor-serve` makes them the server's defaults. Light: the server imports this.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from arbor_core import (
    AllocatorSettings,
    Device,
    Engine,
    EngineNeeds,
    EngineSpec,
    Executor,
    ExecutorSettings,
    InferenceBackend,
    Launcher,
    PoolAllocator,
    RanksCommand,
    Servable,
    Services,
    Trainer,
    hookimpl,
)
from arbor_core.engine import EngineProcess

from .config import NODE, EngineOptions, LauncherOptions, MockCommandsConfig, MockConfig, MockGrpoConfig

GPUS, SERVING = 4, 1
"""Simulated devices to train on and to serve from, where `gpu.train` and `gpu.inference` do not say."""
GPU_BYTES = 80 << 30


class MockBackend:
    """Starts `python -m arbor_mock.engine`."""

    options = EngineOptions

    def needs(self, path: str, options: Mapping[str, Any], devices: Sequence[Device]) -> EngineNeeds:
        """What its options say."""
        return EngineNeeds(options["devices"], options["share"], options["adapters"], options["replicas"])

    def serves(self, options: Mapping[str, Any]) -> Servable:
        """Whatever looks like an adapter or a model."""
        return Servable()

    async def find(self, path: str) -> None:
        """Every name is a model."""

    async def start(self, spec: EngineSpec) -> Engine:
        """See `arbor_core.InferenceBackend.start`."""
        return await EngineProcess.start([sys.executable, "-m", "arbor_mock.engine"], {}, spec)


class DirectBackend(MockBackend):
    """The same, but policies come from the trainer's memory and not as files."""

    sender = "arbor_mock.sender:sender"


DEVICES_OF_A_NODE = 4
"""To train on, of each machine of the allocator `mock_nodes`."""


def simulated_devices(settings: AllocatorSettings, node: Callable[[int], str] = lambda index: "") -> PoolAllocator:
    """An allocator of devices that are not there.

    Args:
        node: The machine that those to train on belong to, by index.
    """
    train = settings.train if settings.train is not None else range(GPUS)
    first = max(train, default=-1) + 1
    serve = settings.inference if settings.inference is not None else range(first, first + SERVING)
    return PoolAllocator(
        {
            "train": [Device(f"mock:{index}", "mock", index, GPU_BYTES, node(index)) for index in train],
            "engine": [Device(f"mock:{index}", "mock", index, GPU_BYTES) for index in serve],
        }
    )


def simulating() -> bool:
    """Whether ARBOR_MOCK_GPU asks for simulated devices in place of real ones."""
    return os.environ.get("ARBOR_MOCK_GPU", "").lower() not in ("", "0", "false", "no")


@hookimpl
def arbor_trainers() -> Mapping[str, Trainer]:
    # With real devices a job is mocked only if it asks for `mock`: never because nothing else is installed.
    methods = ("supervised", "dpo", "reinforcement") if simulating() else ()
    return {
        "mock": Trainer(
            config=MockConfig,
            entry="arbor_mock.train:train",
            methods=methods,
            check_row="arbor_mock.rows:check_row",
            preload=("arbor_mock.train",),
            ranks=False,  # torchrun comes with torch
            simulated=True,
        ),
        "mock_grpo": Trainer(
            config=MockGrpoConfig,
            entry="arbor_mock.grpo:train",
            methods=("grpo",) if simulating() else (),
            preload=("arbor_mock.grpo",),
            min_rows=0,
            ranks=False,
            input="rollouts",
            adapters=True,
            simulated=True,
        ),
        "mock_commands": Trainer(
            config=MockCommandsConfig,
            entry="arbor_mock.commands:train",
            preload=("arbor_mock.commands",),
            ranks=False,
            input="commands",
            simulated=True,
        ),
    }


@hookimpl
def arbor_routes(services: Services) -> list[Any]:
    from .routes import routes  # only now Litestar

    return routes(services)


@hookimpl
def arbor_allocators() -> Mapping[str, Callable[[AllocatorSettings], PoolAllocator]]:
    return {
        "mock": simulated_devices,
        "mock_node": partial(simulated_devices, node=lambda index: NODE),
        "mock_nodes": partial(simulated_devices, node=lambda index: f"{NODE}-{index // DEVICES_OF_A_NODE}"),
    }


def simulated_executor(settings: ExecutorSettings) -> Executor:
    """An executor without processes; imported only by servers that use it."""
    from .executor import SimulatedExecutor

    return SimulatedExecutor(settings)


def node_executor(settings: ExecutorSettings) -> Executor:
    """An executor whose attempts run on another machine, which is simulated; imported only by servers that use it."""
    from .node_executor import NodeExecutor

    return NodeExecutor(settings)


@hookimpl
def arbor_executors() -> Mapping[str, Callable[[ExecutorSettings], Executor]]:
    return {"mock": simulated_executor, "mock_node": node_executor}


def ranks_without_torch(options: LauncherOptions, python: str, ranks: int) -> RanksCommand:
    return RanksCommand((python, "-m", "arbor_mock.ranks", str(options.nice), str(ranks), python))


@hookimpl
def arbor_launchers() -> Mapping[str, Launcher]:
    return {"mock": Launcher(LauncherOptions, ranks_without_torch)}


@hookimpl
def arbor_inference_backends() -> Mapping[str, Callable[[], InferenceBackend]]:
    return {"mock": MockBackend, "mock_direct": DirectBackend}
