"""Arbor's face: everything that a plugin may import.

A plugin is a module named under the entry-point group `arbor` with functions marked `@hookimpl`; the hooks are in
`arbor_core.hookspecs`. See docs/plugins.md.
"""

from pluggy import HookimplMarker

from .allocator import PoolAllocator
from .chats import Chats, ChatText, Conversation
from .engine_process import EngineProcess
from .inbox import Group, Record, Rollout
from .types import (
    Allocator,
    AllocatorSettings,
    ArborError,
    Bundle,
    Checkpoint,
    CheckpointRequest,
    Claim,
    ConfigError,
    Device,
    Engine,
    EngineSpec,
    Event,
    Executor,
    ExecutorSettings,
    Fed,
    InferenceBackend,
    JobFailed,
    JobStopped,
    JobView,
    Lease,
    Order,
    Placement,
    Plan,
    QueuedJob,
    RolloutConfig,
    Run,
    RunningJob,
    Scheduler,
    Services,
    Snapshot,
    Trainer,
    UnknownModelError,
    Weights,
)

hookimpl = HookimplMarker("arbor")

__all__ = [
    "Allocator",
    "AllocatorSettings",
    "ArborError",
    "Bundle",
    "ChatText",
    "Chats",
    "Checkpoint",
    "CheckpointRequest",
    "Claim",
    "ConfigError",
    "Conversation",
    "Device",
    "Engine",
    "EngineProcess",
    "EngineSpec",
    "Event",
    "Executor",
    "ExecutorSettings",
    "Fed",
    "Group",
    "InferenceBackend",
    "JobFailed",
    "JobStopped",
    "JobView",
    "Lease",
    "Order",
    "Placement",
    "Plan",
    "PoolAllocator",
    "QueuedJob",
    "Record",
    "Rollout",
    "RolloutConfig",
    "Run",
    "RunningJob",
    "Scheduler",
    "Services",
    "Snapshot",
    "Trainer",
    "UnknownModelError",
    "Weights",
    "hookimpl",
]
