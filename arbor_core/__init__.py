"""Arbor's face, the first of the four doors: what trainers, schedulers, allocators and executors import. A program of
one's own, a notebook say, has a server in itself with `open_system(serve_settings(...))`: see docs/python.md.

A plugin is a module named under the entry-point group `arbor` with functions marked `@hookimpl`; the hooks are in
`arbor_core.hookspecs`. The other doors are `arbor_core.http` (routes), `arbor_core.engine` (engine processes) and
`arbor_core.testing`. See docs/plugins.md.

For trainers: `FileRun`, `RolloutRun`, `CommandRun` and the nouns of `arbor_core.types`, training rows (`read_rows`,
`check_chat_row`), conversations on their way to tokens (`Chats`), when to write resume points (`ResumeClock`). For
executors, which run attempts elsewhere or otherwise: the environments of their processes (`clean_env`, `worker_env`)
and sockets (`short_address`); the worker's side of a job directory (`open_run`, `explain`, `fail`), its files
(`AttemptDir`, `last_beat`, `manifest`, `newest_first`, `replace`) and its server's bell (`wake`); places where tests
let a process die (`crash_point`). For schedulers: the ways to place a claim on free devices (`placements`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hookspecs import hookimpl
from .types import (
    Accepted,
    Allocator,
    AllocatorSettings,
    ArborError,
    AttemptOrder,
    Bundle,
    Checkpoint,
    CheckpointDiscarded,
    CheckpointEvent,
    CheckpointRequest,
    CheckpointWithdrawn,
    Claim,
    Command,
    CommandRun,
    Completion,
    ConfigError,
    Desired,
    Device,
    Engine,
    EngineNeeds,
    EngineSpec,
    ErrorEvent,
    Event,
    Executor,
    ExecutorSettings,
    Exit,
    FileRun,
    Group,
    GroupsSkipped,
    HyperparametersResolved,
    InferenceBackend,
    JobFailed,
    JobStopped,
    JobView,
    Launcher,
    Lease,
    LiveRun,
    MessageEvent,
    MetricsEvent,
    NamedCheckpoint,
    PausedEvent,
    Placement,
    Plan,
    Policy,
    PolicyPublished,
    PolicyWeights,
    QueuedJob,
    RanksCommand,
    Record,
    ResultEvent,
    ResumePointWritten,
    Rollout,
    RolloutConfig,
    RolloutRun,
    Run,
    RunningJob,
    Scheduler,
    Scored,
    Sender,
    Servable,
    Services,
    Snapshot,
    StepInputs,
    TrainedWeights,
    Trainer,
    UnknownModelError,
    Weights,
    placements,
)

if TYPE_CHECKING:
    from .application.system import Arbor, open_system
    from .builtin.allocator import PoolAllocator
    from .config.compose import serve_settings
    from .crash_points import crash_point
    from .data.chat_format import Chats
    from .data.conversation import ChatText, Conversation, LeftOutError, left_out
    from .data.marks import Found, shape_of
    from .data.message_form import THOUGHTS, UNSAID
    from .data.message_rules import canonical, canonical_message
    from .data.rows import RowError, check_chat_row, check_message, excerpt, excerpt_of, read_rows
    from .jobdir.checkpoints import MANIFEST, Manifest, manifest, newest_first
    from .jobdir.heartbeat import last_beat
    from .jobdir.layout import AttemptDir
    from .process.environment import clean_env, worker_env
    from .process.wakeup import short_address, wake
    from .storage.atomic import replace
    from .worker.failures import explain, fail
    from .worker.file_run import FileWorkerRun
    from .worker.resume_clock import ResumeClock
    from .worker.run import WorkerRun, open_run

LAZY = {
    "Arbor": "application.system",
    "open_system": "application.system",
    "serve_settings": "config.compose",
    "PoolAllocator": "builtin.allocator",
    "crash_point": "crash_points",
    "ChatText": "data.conversation",
    "Chats": "data.chat_format",
    "canonical": "data.message_rules",
    "canonical_message": "data.message_rules",
    "Conversation": "data.conversation",
    "LeftOutError": "data.conversation",
    "left_out": "data.conversation",
    "Found": "data.marks",
    "shape_of": "data.marks",
    "THOUGHTS": "data.message_form",
    "UNSAID": "data.message_form",
    "RowError": "data.rows",
    "check_chat_row": "data.rows",
    "check_message": "data.rows",
    "excerpt": "data.rows",
    "excerpt_of": "data.rows",
    "read_rows": "data.rows",
    "MANIFEST": "jobdir.checkpoints",
    "Manifest": "jobdir.checkpoints",
    "manifest": "jobdir.checkpoints",
    "newest_first": "jobdir.checkpoints",
    "last_beat": "jobdir.heartbeat",
    "AttemptDir": "jobdir.layout",
    "clean_env": "process.environment",
    "worker_env": "process.environment",
    "short_address": "process.wakeup",
    "wake": "process.wakeup",
    "replace": "storage.atomic",
    "explain": "worker.failures",
    "fail": "worker.failures",
    "FileWorkerRun": "worker.file_run",
    "ResumeClock": "worker.resume_clock",
    "WorkerRun": "worker.run",
    "open_run": "worker.run",
}
"""Where the names are that are imported when they are first asked for: nouns are wanted by all, these by few."""


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'arbor_core' has no attribute '{name}'")
    return getattr(import_module(f"arbor_core.{LAZY[name]}"), name)


__all__ = [
    "MANIFEST",
    "THOUGHTS",
    "UNSAID",
    "Accepted",
    "Allocator",
    "AllocatorSettings",
    "Arbor",
    "ArborError",
    "AttemptDir",
    "AttemptOrder",
    "Bundle",
    "ChatText",
    "Chats",
    "Checkpoint",
    "CheckpointDiscarded",
    "CheckpointEvent",
    "CheckpointRequest",
    "CheckpointWithdrawn",
    "Claim",
    "Command",
    "CommandRun",
    "Completion",
    "ConfigError",
    "Conversation",
    "Desired",
    "Device",
    "Engine",
    "EngineNeeds",
    "EngineSpec",
    "ErrorEvent",
    "Event",
    "Executor",
    "ExecutorSettings",
    "Exit",
    "FileRun",
    "FileWorkerRun",
    "Found",
    "Group",
    "GroupsSkipped",
    "HyperparametersResolved",
    "InferenceBackend",
    "JobFailed",
    "JobStopped",
    "JobView",
    "Launcher",
    "Lease",
    "LeftOutError",
    "LiveRun",
    "Manifest",
    "MessageEvent",
    "MetricsEvent",
    "NamedCheckpoint",
    "PausedEvent",
    "Placement",
    "Plan",
    "Policy",
    "PolicyPublished",
    "PolicyWeights",
    "PoolAllocator",
    "QueuedJob",
    "RanksCommand",
    "Record",
    "ResultEvent",
    "ResumeClock",
    "ResumePointWritten",
    "Rollout",
    "RolloutConfig",
    "RolloutRun",
    "RowError",
    "Run",
    "RunningJob",
    "Scheduler",
    "Scored",
    "Sender",
    "Servable",
    "Services",
    "Snapshot",
    "StepInputs",
    "TrainedWeights",
    "Trainer",
    "UnknownModelError",
    "Weights",
    "WorkerRun",
    "canonical",
    "canonical_message",
    "check_chat_row",
    "check_message",
    "clean_env",
    "crash_point",
    "excerpt",
    "excerpt_of",
    "explain",
    "fail",
    "hookimpl",
    "last_beat",
    "left_out",
    "manifest",
    "newest_first",
    "open_run",
    "open_system",
    "placements",
    "read_rows",
    "replace",
    "serve_settings",
    "shape_of",
    "short_address",
    "wake",
    "worker_env",
]
