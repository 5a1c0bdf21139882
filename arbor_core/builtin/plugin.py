"""The core's own plugin: the schedulers, the allocator and the executor that come with Arbor."""

from __future__ import annotations

from collections.abc import Mapping

from arbor_core.hookspecs import hookimpl
from arbor_core.types import AllocatorFactory, ExecutorFactory, SchedulerFactory

from .allocator import LocalAllocator
from .executor import LocalExecutor
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
