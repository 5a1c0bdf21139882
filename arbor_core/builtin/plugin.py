"""The core's own plugin: the schedulers, the allocator, the executor and the launchers that come with Arbor."""

from __future__ import annotations

from collections.abc import Mapping

from arbor_core.hookspecs import hookimpl
from arbor_core.types import AllocatorFactory, ExecutorFactory, Launcher, SchedulerFactory

from .allocator import LocalAllocator
from .executor import LocalExecutor
from .launchers import NONE, TORCHRUN
from .schedulers import FifoScheduler, PriorityScheduler


@hookimpl
def arbor_schedulers() -> Mapping[str, SchedulerFactory]:
    return {"fifo": FifoScheduler, "priority": PriorityScheduler}


@hookimpl
def arbor_allocators() -> Mapping[str, AllocatorFactory]:
    return {"local": LocalAllocator.from_settings}


@hookimpl
def arbor_executors() -> Mapping[str, ExecutorFactory]:
    return {"local": LocalExecutor}


@hookimpl
def arbor_launchers() -> Mapping[str, Launcher]:
    return {"none": NONE, "torchrun": TORCHRUN}
