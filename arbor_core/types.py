"""The nouns of Arbor. Imports nothing heavy: the server, every worker and every plugin share this file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from msgspec import Meta, Struct
from msgspec import field as struct_field

if TYPE_CHECKING:
    from .inbox import Record
    from .live import Live
    from .rollouts import Policy

ConfigT = TypeVar("ConfigT", bound=Struct)
ConfigT_co = TypeVar("ConfigT_co", bound=Struct, covariant=True)

PROTOCOL = 1
"""Version of the job directory's layout; a worker refuses a directory of another one."""

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Desired = Literal["run", "pause", "cancel", "finish"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class ArborError(Exception):
    """A mistake the user can mend; shown as one line, without a traceback."""


class ConfigError(ArborError, ValueError):
    """A configuration value is wrong. `path` is the key as the user typed it, `code` OpenAI's word for the mistake."""

    def __init__(self, message: str, *, path: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.path, self.code = path, code


class UnknownModelError(ArborError):
    """There is no model where one was said to be. The message says where it was looked for."""


class JobFailed(ArborError):
    """Raised by a trainer to end its job as `failed`; becomes the job's `error` object.

    Args:
        message: What was tried, what was expected, what to do.
        code: OpenAI's word where there is one (`invalid_training_file`), ours otherwise.
        param: The request's field at fault, if one is.
    """

    def __init__(self, message: str, *, code: str = "training_failed", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class JobStopped(ArborError):
    """Raised inside a trainer (by `Run.stop_if_asked`) when the job is to pause or was cancelled."""

    def __init__(self, desired: Desired) -> None:
        super().__init__(f"the job is asked to {desired}")
        self.desired = desired


# --- devices: what a job asks for and what it holds -------------------------------------------------------------------


class Device(Struct, frozen=True):
    """One thing that can be leased. `id` is unique on the machine: a GPU's UUID, or `cpu:0` for a CPU slot."""

    id: str
    kind: Literal["cpu", "cuda", "mock"] = "cpu"
    index: int = 0
    memory: int = 0
    """Bytes; 0 where it is not known."""


class Bundle(Struct, frozen=True):
    """Some devices of one kind for one purpose."""

    role: str
    """`train`, or `engine:<base model>`."""
    count: int = 1
    share: float = 1.0
    """Fraction of each device's memory, in (0, 1]."""
    kind: str | None = None


class Claim(Struct, frozen=True):
    """What somebody asks for: all bundles or none, so that nobody holds half of what it needs."""

    owner: str
    """A job's id, or an engine's key."""
    bundles: tuple[Bundle, ...]


class Lease(Struct, frozen=True):
    """What the owner holds: the devices of each bundle, in the claim's order."""

    id: str
    claim: Claim
    devices: tuple[tuple[Device, ...], ...]

    def of(self, role: str) -> tuple[Device, ...]:
        """The devices leased for one role."""
        pairs = zip(self.claim.bundles, self.devices, strict=True)
        return tuple(device for bundle, devices in pairs if bundle.role == role for device in devices)


class Allocator(Protocol):
    """Grants leases. `inventory` may change while the server runs (a GPU that falls off the bus)."""

    def inventory(self) -> Mapping[str, Sequence[Device]]:
        """Devices by pool: `train` and `engine`."""
        ...

    def free(self) -> Mapping[str, int]:
        """How many devices of each pool nobody holds."""
        ...

    def restore(self, lease: Lease) -> None:
        """Take a lease that was granted before the server restarted."""
        ...

    async def acquire(self, claim: Claim) -> Lease:
        """Wait until the whole claim fits and hold it. Cancelling the call leaves nothing held.

        Raises:
            ArborError: the claim can never fit this inventory.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Give the devices back; releasing twice is harmless."""
        ...


# --- scheduling -------------------------------------------------------------------------------------------------------


class QueuedJob(Struct, frozen=True):
    """A job that waits, as a scheduler sees it."""

    id: str
    claim: Claim
    seq: int
    """Order of arrival."""
    priority: int = 0
    """What its author gave it: higher is more urgent."""
    waited: int = 0
    """How many attempts of other jobs were started while it was queued."""


class RunningJob(Struct, frozen=True):
    """A job that holds devices, as a scheduler sees it."""

    id: str
    claim: Claim
    seq: int
    priority: int = 0
    waited: int = 0
    """As long as it waited before it was started."""
    stopping: bool = False
    """It is about to give its devices back."""


class Snapshot(Struct, frozen=True):
    """All that a scheduler may know."""

    queued: tuple[QueuedJob, ...]
    """Of a very long queue those that came first and those of the highest priority."""
    running: tuple[RunningJob, ...]
    free: dict[str, int]
    """Free devices by pool (`train`, `engine`)."""


class Plan(Struct, frozen=True):
    """What to do now: jobs to start, and running jobs that are to write a checkpoint and queue again, so that another
    can start later."""

    start: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()


class Scheduler(Protocol):
    def plan(self, snapshot: Snapshot) -> Plan:
        """Choose from the snapshot and nothing else: same snapshot, same plan."""
        ...


# --- running an attempt -----------------------------------------------------------------------------------------------


class Placement(Struct, frozen=True):
    """Where an attempt runs: the devices of each rank, and how many CPU threads a rank may use."""

    devices: tuple[Device, ...]
    threads: int


class Order(Struct, frozen=True):
    """`attempts/<n>/order.json`: what the keeper of one attempt starts."""

    dir: Path
    """The attempt's directory."""
    argv: tuple[str, ...]
    """The command for a cold start."""
    env: dict[str, str]
    """Variables beside those that every attempt gets. They must be set before any library is imported."""
    python: str
    preload: tuple[str, ...] = ()
    prove: str | None = None
    launcher: str = "cold"
    grace: float = 30.0
    """Seconds between SIGTERM and SIGKILL."""
    bell: str | None = None
    """Datagram socket that is rung when the attempt has written something."""
    room_seconds: float = 60.0
    """How long a checkpoint waits for room on a full disk before the job is paused."""


class Exit(Struct, frozen=True):
    """`attempts/<n>/exit.json`: how the attempt's process ended. Written by the keeper, by nobody else."""

    code: int
    """Exit status; negative: the signal that ended it."""
    at: float


class Executor(Protocol):
    """Starts attempts and finds them again. A ref is opaque text that outlives the server."""

    def prepare(self, python: str | None, preload: tuple[str, ...], prove: str | None) -> None:
        """An attempt of such a trainer may come soon: get ready without waiting. May do nothing."""
        ...

    async def start(self, order: Order, placement: Placement) -> str: ...

    def poll(self, ref: str) -> bool:
        """Whether the attempt's keeper lives."""
        ...

    def signal(self, ref: str, number: int) -> None:
        """Send a signal to the attempt; nothing happens if it has ended."""
        ...

    def adopt(self, ref: str) -> bool:
        """Take over an attempt started by an earlier server; False if it does not live."""
        ...

    async def close(self) -> None:
        """Leave attempts running and free what only this server needs (template processes)."""
        ...


# --- what a run reports -----------------------------------------------------------------------------------------------

EventType = Literal[
    "message", "metrics", "checkpoint", "withdrawn", "discarded", "weights", "resolved", "result", "paused", "error"
]
Level = Literal["info", "warn", "error"]


class Event(Struct, omit_defaults=True):
    """Something a run reports. One line of `events.jsonl`."""

    type: EventType
    message: str = ""
    level: Level = "info"
    step: int = 0
    data: dict[str, Any] = struct_field(default_factory=dict)
    at: float = 0.0
    """Seconds since the epoch; set when the event is written."""


class Checkpoint(Struct, frozen=True):
    """A directory that a manifest vouches for."""

    step: int
    dir: Path
    metrics: dict[str, float] = struct_field(default_factory=dict)


class CheckpointRequest(Struct, frozen=True):
    """A checkpoint that a client asked for by name."""

    name: str
    metadata: dict[str, Any] = struct_field(default_factory=dict)


class Fed(Struct, frozen=True):
    """What one step took from the inbox: enough to see later whether it is still the same."""

    end: int
    """Position up to which the inbox was used."""
    groups: tuple[tuple[int, int], ...]
    """Position and CRC-32 of each group that was trained on."""
    skipped: tuple[int, ...] = ()
    """Positions of groups that were too old or could not be used."""


class Weights(Struct, frozen=True):
    """Weights that an engine can load under a name: a PEFT adapter directory."""

    name: str
    path: str


class Run(Protocol[ConfigT_co]):
    """What a trainer's function is handed inside its own process."""

    @property
    def config(self) -> ConfigT_co: ...
    @property
    def job_id(self) -> str: ...
    @property
    def dir(self) -> Path:
        """The job's directory. Scratch space of the attempt is `work`."""
        ...

    @property
    def work(self) -> Path:
        """Scratch space of this attempt; nothing in it is kept."""
        ...

    @property
    def model(self) -> str:
        """Directory (or hub id) of the base model."""
        ...

    @property
    def training_file(self) -> Path: ...
    @property
    def validation_file(self) -> Path | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of all ranks."""
        ...

    @property
    def threads(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def message(self, text: str, level: Level = "info", **data: Any) -> None:
        """A line for whoever follows the job."""
        ...

    def metrics(
        self, step: int, total_steps: int, digest: str | None = None, fed: Fed | None = None, /, **values: float
    ) -> None:
        """Numbers of one step (`train_loss`, `train_mean_token_accuracy`, `valid_loss`, ...). Steps count from 1.

        `digest` stands for the trained parameters after the step, where it is cheap to tell: a run that was interrupted
        can be compared with one that was not. `fed` says which groups of the inbox formed the step.
        """
        ...

    def resolved(self, **hyperparameters: Any) -> None:
        """The numbers that stand for `"auto"`; the job reports them from now on."""
        ...

    def checkpoint(self, step: int, **metrics: float) -> AbstractContextManager[Path]:
        """`with run.checkpoint(step) as folder:` write into `folder`; it is committed as a whole or not at all."""
        ...

    def write_checkpoint(self, step: int, write: Callable[[Path], None], **metrics: float) -> None:
        """The same by a function that can be called again: it is, with an empty folder, while the disk is full.

        Raises:
            OSError: there was still no room after `limits.room_seconds`; the job will be paused.
        """
        ...

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, to resume from. Newer ones are withdrawn: no longer offered as models.

        Raises:
            JobFailed: `checkpoint_corrupted`: there are some, and none is whole.
        """
        ...

    def keep_checkpoints(self, count: int) -> None:
        """Delete all checkpoints but the newest `count` and those with names, and stop offering them as models."""
        ...

    @property
    def adapter(self) -> Path | None:
        """Directory of the PEFT adapter to start from; None: a new one, or all weights. For trainers that declare
        `adapters`."""
        ...

    def groups(self, position: int, wait: float) -> list[Record]:
        """The groups in the inbox from `position` on, in order of arrival; waits up to `wait` seconds for the first.
        Only rank 0 may call it.

        Raises:
            InboxDamagedError: a record is not what was written.
        """
        ...

    def publish(self, version: int, handled: int) -> AbstractContextManager[Path]:
        """`with run.publish(step, handled) as folder:` write the policy into `folder`, as a PEFT adapter or as a model;
        from then on new completions are sampled from it.

        Args:
            version: Optimizer steps that it has seen.
            handled: How many groups of the inbox were trained on or skipped so far: so many more may be sent.
        """
        ...

    def passed_over(self, handled: int) -> None:
        """Say that groups were skipped and no step follows yet: so many were handled in all, and more may be sent."""
        ...

    def asked_checkpoints(self) -> list[CheckpointRequest]:
        """Checkpoints that clients asked for by name and that are not there yet. See `name_checkpoint`."""
        ...

    def name_checkpoint(self, request: CheckpointRequest, step: int) -> None:
        """Give the checkpoint of this step, which was written just now, a name."""
        ...

    def stop_if_asked(self) -> None:
        """Call between steps, at a place where training could be taken up again.

        Raises:
            JobStopped: the job is to pause or was cancelled. Write a checkpoint if it is to pause, then let it pass.
        """
        ...

    def desired(self) -> Desired:
        """What the job is asked to do now. `finish`, for trainers that learn from rollouts: make no more steps, write a
        checkpoint if the last step has none, and call `Run.finish`."""
        ...

    def finish(self, checkpoint: Checkpoint, trained_tokens: int, **result: Any) -> None:
        """Name the checkpoint that is the job's model. `adapter` in it means: a PEFT adapter, else full weights."""
        ...


# --- plugins ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """A training method: how its config is typed, and which function trains.

    Args:
        config: Struct of its configuration; the defaults are in `conf/trainer/<name>.yaml`.
        entry: `"package.module:function"`, imported only inside the worker. Called as `function(run)`.
        methods: OpenAI's `method.type` words it answers to, besides its own name.
        check_row: `"package.module:function"` that is called with each training row (a dict) and raises ValueError for
            a row the trainer cannot use. Runs in a process of its own, before the job is queued.
        preload: Modules that a warm worker has imported already.
        prove: `"package.module:function"` that uses the preloaded libraries once, in a test fork.
        min_rows: Fewer rows fail the job.
        python: Interpreter of another virtual environment; None: the server's.
        ranks: A job with several devices is as many processes, started by torchrun or accelerate. False: one process
            that uses all of them.
        rollouts: It learns from groups that clients send while it runs: `config` is a `RolloutConfig`, and there is no
            training file.
        adapters: It can start from an adapter that another job has trained (`run.adapter`).
    """

    config: type[Struct]
    entry: str
    methods: tuple[str, ...] = ()
    check_row: str = "arbor_core.data:check_chat_row"
    preload: tuple[str, ...] = ()
    prove: str | None = None
    min_rows: int = 10
    python: str | None = None
    ranks: bool = True
    rollouts: bool = False
    adapters: bool = False


class RolloutConfig(Struct, frozen=True, kw_only=True):
    """What the server must know of a trainer that learns from rollouts. Part of its configuration."""

    num_generations: Annotated[int, Meta(ge=2, le=1024)]
    """Rollouts of a group that a client sends whole."""
    groups_per_step: Annotated[int, Meta(ge=1, le=4096)]
    """Groups of an optimizer step."""
    max_staleness: Annotated[int, Meta(ge=0, le=64)]
    """Optimizer steps that a group may be older than the policy it trains: 0 is strictly on policy, 1 lets clients
    sample while a step is made. Clients are offered credits for so many."""
    too_stale: Annotated[int, Meta(ge=0)] | None
    """Groups that are older are skipped; None: as `max_staleness` says. More lets clients that sample ahead of their
    credits train on older groups."""
    temperature: Annotated[float, Meta(gt=0, le=2)]
    """What rollouts are sampled at."""
    offer_seconds: Annotated[float, Meta(gt=0)]
    """A batch id that no group came for in so long is withdrawn, and a new one offered."""


class EngineSpec(Struct, frozen=True):
    """What one engine process serves."""

    model: str
    """Public name of the base model."""
    path: str
    """Directory (or hub id) of its weights. Safetensors only, never remote code."""
    dir: Path
    """The engine's scratch directory."""
    devices: tuple[Device, ...]
    threads: int
    token: str = ""
    """Bearer token the engine demands on every route but /health."""
    options: dict[str, Any] = struct_field(default_factory=dict)
    """The backend's own options, from `conf/backend/<name>.yaml`."""
    version: int | None = None
    """Policy version of the weights, of an engine that is given newer ones while it runs. Where a request asks for
    `return_token_ids`, each choice then says in `policy_version` which was the oldest that sampled any of it."""


class Engine(Protocol):
    """A live engine process with an OpenAI-shaped HTTP face on loopback."""

    @property
    def url(self) -> str: ...
    @property
    def headers(self) -> dict[str, str]:
        """What every request to it must carry."""
        ...

    async def load_weights(self, weights: Weights) -> None: ...
    async def unload(self, name: str) -> None: ...
    async def update(self, path: str, version: int) -> None:
        """Replace all weights by those of a directory, between two iterations: requests that run go on with them.

        Raises:
            ArborError: it cannot. Its weights may be mixed now, so that it is killed and started anew from the
                directory; the same is done where a backend knows no such update.
        """
        ...

    async def health(self) -> bool:
        """Whether it lives and answers."""
        ...

    async def quiet(self, patience: float) -> float | None:
        """Seconds for which it has had work and has not got on with it; 0 without work.

        None: it did not answer within `patience` seconds.
        """
        ...

    async def wait(self) -> str:
        """Return when the engine has ended, in whatever way; the text says how."""
        ...

    async def stop(self) -> None: ...
    async def kill(self) -> None:
        """End it at once, though it may be deaf; `wait` returns then."""
        ...


class InferenceBackend(Protocol):
    """A way to serve a model."""

    @property
    def options(self) -> type[Struct]:
        """Struct of its options, whose defaults are in `conf/backend/<name>.yaml`; checked when the server starts."""
        ...

    async def find(self, path: str) -> None:
        """Make sure, within seconds, that there is a model; no device is taken for one that does not exist.

        Raises:
            UnknownModelError: neither the directory exists nor a model of that id.
        """
        ...

    async def start(self, spec: EngineSpec) -> Engine:
        """Start an engine and return when it answers.

        Raises:
            ArborError: it did not start; the message says why.
        """
        ...


@dataclass(frozen=True)
class AllocatorSettings:
    """What an allocator's factory is given: the operator's `gpu.train` and `gpu.inference` (None: not set)."""

    train: Sequence[int] | None
    inference: Sequence[int] | None
    engines: int = 4
    """Engines that may run at once where there is no GPU."""


@dataclass(frozen=True)
class ExecutorSettings:
    """What an executor's factory is given."""

    launcher: str
    """`warm` or `cold`."""
    runtime: Path
    """Directory for sockets and logs that no job owns."""


SchedulerFactory = Callable[[], Scheduler]
AllocatorFactory = Callable[[AllocatorSettings], Allocator]
ExecutorFactory = Callable[[ExecutorSettings], Executor]
BackendFactory = Callable[[], InferenceBackend]


@dataclass
class JobView:
    """A job as plugins see it (`arbor_job_event`)."""

    id: str
    trainer: str
    model: str
    status: Status
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


class NamedCheckpoint(Struct, frozen=True):
    """A checkpoint that a client gave a name."""

    name: str
    step: int
    model: str
    """What it is called in completions, and as the `model` of another job."""
    metadata: dict[str, Any]
    created_at: int


class Services(Protocol):
    """What `arbor_routes` may use: create and find jobs, send them rollouts, and reach their models.

    Wherever there is no such job, or it is another owner's, an ArborError is raised that the client gets as 404.
    """

    async def create_job(self, request: Mapping[str, Any], owner: str, warnings: Sequence[str] = ()) -> dict[str, Any]:
        """Create a fine-tuning job from the body of `POST /v1/fine_tuning/jobs`; returns the job object.

        Args:
            warnings: More events to begin the job with.
        """
        ...

    def defaults(self, method: str) -> Mapping[str, Any]:
        """The hyperparameters of a new job of this method that says nothing of them."""
        ...

    def newest(self, owner: str) -> str:
        """The id of the newest job that learns from rollouts, of those that have not ended if there are any."""
        ...

    async def job(self, job_id: str, owner: str) -> dict[str, Any]:
        """The job object."""
        ...

    def events(self, job_id: str, owner: str) -> AsyncIterator[dict[str, Any]]:
        """The job's event objects, oldest first, as they come; ends when the job has ended."""
        ...

    async def ask(self, job_id: str, owner: str, desired: Desired) -> dict[str, Any]:
        """Ask a job to run, pause, cancel or finish; returns the job object as it is then.

        Raises:
            ArborError: it has ended otherwise.
        """
        ...

    def asked(self, job_id: str, owner: str) -> Desired:
        """What was asked of a job last."""
        ...

    def rollouts(self, job_id: str, owner: str) -> Live:
        """Where to send groups of a job that learns from rollouts, and what its model has sampled.

        Raises:
            ArborError: 400: it learns from a file, or has ended.
        """
        ...

    def policy(self, job_id: str, owner: str) -> Policy:
        """What the trainer has published and handled, also after its end."""
        ...

    async def checkpoint(
        self, job_id: str, owner: str, name: str, metadata: Mapping[str, Any], seconds: float
    ) -> NamedCheckpoint:
        """Have a job write a checkpoint and give it a name; waits until it is there. One that has succeeded has its
        last checkpoint named.

        Raises:
            ArborError: 400: the name cannot be one, or the job has ended otherwise; 504: it took longer than `seconds`,
                and the checkpoint comes later.
        """
        ...

    def checkpoints(self, job_id: str, owner: str) -> list[NamedCheckpoint]:
        """The checkpoints with names, oldest first."""
        ...

    async def warm(self, model: str, owner: str) -> None:
        """Start the engine that serves a model, if none does."""
        ...
