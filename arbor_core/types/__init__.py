"""The nouns of Arbor. Imports nothing heavy: the server, every worker and every plugin share them."""

from .attempts import Executor, Exit, Order, Placement
from .devices import Allocator, Bundle, Claim, Device, Lease
from .engines import Engine, EngineSpec, InferenceBackend, Weights
from .errors import ArborError, ConfigError, DevicesLostError, JobFailed, JobStopped, UnknownModelError
from .jobs import PROTOCOL, TERMINAL, Desired, JobView, Status
from .plugins import (
    AllocatorFactory,
    AllocatorSettings,
    BackendFactory,
    ExecutorFactory,
    ExecutorSettings,
    SchedulerFactory,
    Trainer,
)
from .rollouts import Fed, RolloutConfig
from .runs import Checkpoint, CheckpointRequest, ConfigT, ConfigT_co, Event, EventType, Level, Run
from .scheduling import Plan, QueuedJob, RunningJob, Scheduler, Snapshot
from .services import NamedCheckpoint, Services

__all__ = [
    "PROTOCOL",
    "TERMINAL",
    "Allocator",
    "AllocatorFactory",
    "AllocatorSettings",
    "ArborError",
    "BackendFactory",
    "Bundle",
    "Checkpoint",
    "CheckpointRequest",
    "Claim",
    "ConfigError",
    "ConfigT",
    "ConfigT_co",
    "Desired",
    "Device",
    "DevicesLostError",
    "Engine",
    "EngineSpec",
    "Event",
    "EventType",
    "Executor",
    "ExecutorFactory",
    "ExecutorSettings",
    "Exit",
    "Fed",
    "InferenceBackend",
    "JobFailed",
    "JobStopped",
    "JobView",
    "Lease",
    "Level",
    "NamedCheckpoint",
    "Order",
    "Placement",
    "Plan",
    "QueuedJob",
    "RolloutConfig",
    "Run",
    "RunningJob",
    "Scheduler",
    "SchedulerFactory",
    "Services",
    "Snapshot",
    "Status",
    "Trainer",
    "UnknownModelError",
    "Weights",
]
