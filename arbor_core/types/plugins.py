"""What plugins bring: training methods, and factories of the rest with what each is given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct

from .attempts import Executor
from .devices import Allocator
from .engines import InferenceBackend
from .jobs import InputKind
from .scheduling import Scheduler


class TrainedWeights(Struct, frozen=True, kw_only=True):
    """What a configuration trains, as an engine will have to load it."""

    adapter: str | None
    """Kind of adapter (`lora`); None: all weights."""
    modules: tuple[str, ...] = ()
    """Names of the modules that the adapter changes; empty: not known."""
    kinds: Mapping[str, str] = {}
    """By each kind of module that the adapter changes (`linear`, `embedding`, `convolution`, ...) the name of one such
    module; empty: not known."""
    dtype: str | None = None
    """Number format in which they are stored; None: not known, or any will do."""
    keys: Mapping[str, str] = {}
    """The configuration's keys that say so, by the names above: `{"modules": "lora.target_modules"}`. `modules` stands
    for their kinds too."""


@dataclass(frozen=True)
class Trainer:
    """A training method: how its config is typed, and which function trains.

    Args:
        config: Struct of its configuration; the defaults are in `conf/trainer/<name>.yaml`.
        entry: `"package.module:function"`, imported only inside the worker. Called as `function(run)`.
        methods: OpenAI's `method.type` words it answers to, besides its own name.
        check_row: `"package.module:function"` that is called with each training row (a dict) and raises ValueError for
            a row the trainer cannot use; what it returns (None or texts) are warnings. Runs in a process of its own,
            before the job is queued.
        model_check: `"package.module:function"` that looks at rows with the model's eyes, whatever its chat template
            leaves out for one. Called with the folder or hub id of the weights that the job starts from, in the same
            process, it returns what is called with each row that `check_row` takes, and answers as that does; None: it
            has nothing to say.
        preload: Modules that a warm worker has imported already.
        prove: `"package.module:function"` that uses the preloaded libraries once, in a test fork.
        min_rows: Fewer rows fail the job.
        python: Interpreter of another virtual environment; None: the server's.
        ranks: A job with several devices is as many processes, started by the launcher that the operator chose. False:
            one process that uses all of them.
        input: What it learns from: `file`, a training file (its function is called with a `FileRun`); `rollouts`,
            groups that clients send while it runs, with a `RolloutConfig` as `config` (a `RolloutRun`); `commands`,
            which clients send while it runs, and which it answers (a `CommandRun`).
        rollouts: The former name of `input="rollouts"`; goes with the next release.
        adapters: It can start from an adapter that another job has trained (`run.adapter`).
        continued: Called in the server with the directory of that adapter and the configuration of the job that has
            trained it: what it fixes of this job's. That stands in place of the defaults, and a request that says
            otherwise is refused. None: nothing.
        simulated: It trains nothing and needs no device. With ARBOR_MOCK_GPU=1 the server prefers it to others.
        adapter: Called in the server with a job's whole configuration: whether it trains an adapter, else all weights,
            or more of that as `TrainedWeights`. A job that trains all weights needs more memory, and its policy an
            engine of its own; one whose result no engine could load is refused. None: not known.
        inspect: `"package.module:function"` that is called with a job's whole configuration and the directory (or hub
            id) of its base model, and returns what `adapter` returned and the modules that are trained with their
            kinds, as far as it can be known without the weights; it raises JobFailed for a configuration that the
            model does not take. It runs in a process of its own before the job is queued, where engines take some
            modules only and `adapter` did not say which are trained.
    """

    config: type[Struct]
    entry: str
    methods: tuple[str, ...] = ()
    check_row: str = "arbor_core.data.rows:check_chat_row"
    model_check: str | None = None
    preload: tuple[str, ...] = ()
    prove: str | None = None
    min_rows: int = 10
    python: str | None = None
    ranks: bool = True
    rollouts: bool | None = None
    adapters: bool = False
    continued: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]] | None = None
    simulated: bool = False
    adapter: Callable[[Mapping[str, Any]], bool | TrainedWeights] | None = None
    input: InputKind = "file"
    inspect: str | None = None

    def __post_init__(self) -> None:
        if self.rollouts is not None:
            text = "Trainer(rollouts=True) is called Trainer(input='rollouts') now, and False is the default"
            warnings.warn(text, DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "input", "rollouts" if self.rollouts else self.input)

    def trained(self, config: Mapping[str, Any]) -> TrainedWeights | None:
        """What a configuration trains; None: not known."""
        said = self.adapter(config) if self.adapter else None
        if isinstance(said, bool):
            return TrainedWeights(adapter="lora" if said else None)
        return said


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

    start: str
    """`warm` or `cold`."""
    runtime: Path
    """Directory for sockets and logs that no job owns."""


SchedulerFactory = Callable[[], Scheduler]
AllocatorFactory = Callable[[AllocatorSettings], Allocator]
ExecutorFactory = Callable[[ExecutorSettings], Executor]
BackendFactory = Callable[[], InferenceBackend]
