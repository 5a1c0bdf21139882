"""What a trainer's function is handed inside its own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from msgspec import Struct, field

from .devices import Device
from .events import Level
from .jobs import Desired
from .rollouts import StepInputs
from .senders import PolicyWeights

if TYPE_CHECKING:
    from .commands import Command
    from .rollouts import Record, Scored

ConfigT = TypeVar("ConfigT", bound=Struct)
ConfigT_co = TypeVar("ConfigT_co", bound=Struct, covariant=True)


class Checkpoint(Struct, frozen=True):
    """A directory that a manifest vouches for."""

    step: int
    dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    resume_only: bool = False
    """Written by `write_resume_point`: no model, and gone when the job has ended."""


class CheckpointRequest(Struct, frozen=True):
    """A checkpoint that a client asked for by name."""

    name: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Run(Protocol[ConfigT_co]):
    """What a trainer's function is handed inside its own process, whatever it learns from. What more it is handed
    follows from `Trainer.input`: a `FileRun`, a `RolloutRun` or a `CommandRun`."""

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
    def seed(self) -> int: ...
    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of all ranks."""
        ...

    @property
    def threads(self) -> int: ...
    @property
    def micro_batch_share(self) -> float:
        """How large micro-batches should be, in parts of what they would be: 1, or 0.5 after an attempt that ran
        out of memory. A trainer that heeds it makes more and smaller ones of a step, with the same gradient."""
        ...

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def message(self, text: str, level: Level = "info", **data: Any) -> None:
        """A line for whoever follows the job."""
        ...

    def metrics(self, step: int, total_steps: int, digest: str | None = None, /, **values: float) -> None:
        """Numbers of one step (`train_loss`, `train_mean_token_accuracy`, `valid_loss`, ...). Steps count from 1.

        `digest` stands for the trained parameters after the step, where it is cheap to tell: a run that was interrupted
        can be compared with one that was not.
        """
        ...

    def resolved(self, **hyperparameters: Any) -> None:
        """The numbers that stand for `"auto"`; the job reports them from now on."""
        ...

    def checkpoint(self, step: int, /, **metrics: float) -> AbstractContextManager[Path]:
        """`with run.checkpoint(step) as folder:` write into `folder`; it is committed as a whole or not at all.
        Metrics that are no finite numbers are left out."""
        ...

    def write_checkpoint(self, step: int, write: Callable[[Path], None], /, **metrics: float) -> None:
        """The same by a function that can be called again: it is, with an empty folder, while the disk is full.

        Raises:
            OSError: there was still no room after `limits.room_seconds`; the job will be paused.
        """
        ...

    def write_resume_point(self, step: int, write: Callable[[Path], None], /, **metrics: float) -> bool:
        """Write what training can go on from should it be interrupted, by a function that fills a folder. It is no
        model, only the newest is kept, and it goes with the next checkpoint. Metrics of the step come before it.

        Returns:
            False: the disk had no room for it, and the one before stays; a warning says so.
        """
        ...

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint or resume point that is whole, to resume from. Newer checkpoints are withdrawn: no
        longer offered as models.

        Raises:
            JobFailed: `checkpoint_corrupted`: there are some, and none is whole.
        """
        ...

    def checkpoint_of(self, step: int) -> Checkpoint | None:
        """The newest checkpoint of a step; None: there is none that is whole."""
        ...

    def withdraw_checkpoint(self, checkpoint: Checkpoint, reason: str) -> None:
        """Say that a checkpoint is of no use, and why: it is no longer offered as a model. Its files are set aside."""
        ...

    def keep_checkpoints(self, count: int) -> None:
        """Delete all checkpoints but the newest `count` and those with names, and stop offering them as models."""
        ...

    def report_probes(self, name: str, step: int, answers: Sequence[tuple[str, str]]) -> None:
        """Keep what the checkpoint of a step answers to the job's probes, each a prompt and its completion, with the
        job's samples, for people to read. Once for each step; as samples, left out where there is no room on the disk.

        Args:
            name: Of the checkpoint.
        """
        ...

    @property
    def adapter(self) -> Path | None:
        """Directory of the PEFT adapter to start from; None: a new one, or all weights. For trainers that declare
        `adapters`."""
        ...

    def stop_if_asked(self) -> None:
        """Call between steps, at a place where training could be taken up again.

        Raises:
            JobStopped: the job is to pause or was cancelled. Write a checkpoint if it is to pause, then let it pass.
        """
        ...

    def desired(self) -> Desired:
        """What the job is asked to do now. `finish`, for trainers that learn from what clients send: make no more
        steps, write a checkpoint if the last step has none, and call `Run.finish`."""
        ...

    def finish(self, checkpoint: Checkpoint, trained_tokens: int, *, adapter: bool = False, **more: Any) -> None:
        """Name the checkpoint that is the job's model: a PEFT adapter, else full weights. `more` goes to those who
        observe the job."""
        ...


class FileRun(Run[ConfigT_co], Protocol[ConfigT_co]):
    """What a trainer is handed that learns from a file (`input="file"`)."""

    @property
    def training_file(self) -> Path: ...
    @property
    def validation_file(self) -> Path | None: ...
    def give_name(self, name: str, step: int, metadata: Mapping[str, Any]) -> None:
        """Give the checkpoint of a step a name, in place of another that had it: it is kept, and `<job id>:<name>` is
        its model."""
        ...


class LiveRun(Run[ConfigT_co], Protocol[ConfigT_co]):
    """What a trainer is handed that learns from what clients send while it runs, be it rollouts or commands."""

    def asked_checkpoints(self) -> list[CheckpointRequest]:
        """Checkpoints that clients asked for by name and that are not there yet. See `name_checkpoint`.

        An attempt that follows others is asked for none before it has done again what they had done: clients know of a
        newer policy than the one that it begins with.
        """
        ...

    def name_checkpoint(self, request: CheckpointRequest, step: int) -> None:
        """Give the checkpoint of this step, which was written just now, a name."""
        ...


class RolloutRun(LiveRun[ConfigT_co], Protocol[ConfigT_co]):
    """What a trainer is handed that learns from rollouts (`input="rollouts"`).

    An attempt that follows others is asked to `finish` only when it has handled what they had handled, and is given no
    more groups than those.
    """

    def metrics(
        self, step: int, total_steps: int, digest: str | None = None, fed: StepInputs | None = None, /, **values: float
    ) -> None:
        """As `Run.metrics`. `fed` says which groups of the inbox formed the step."""
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

    def send_policy(self, version: int, handled: int, weights: PolicyWeights) -> None:
        """The same, in the way that the engines of the job's model want it: as files, or by their backend's `Sender`.
        Every rank calls it at the same time. Arguments as those of `publish`."""
        ...

    def report_skipped(self, handled: int) -> None:
        """Say that groups were skipped and no step follows yet: so many were handled in all, and more may be sent."""
        ...

    def report_samples(
        self,
        record: Record,
        step: int | None = None,
        scored: Sequence[Scored] = (),
        decode: Callable[[list[int]], str] | None = None,
        error: str | None = None,
    ) -> None:
        """Keep what was sampled and how it was scored, for people to read. Once for each group: when the step that it
        was trained in is done, before `metrics`, or when it is skipped. A group that an earlier attempt has reported
        is passed over. It never stops a job: where there is no room on the disk, samples are left out.

        Args:
            step: The step it was trained in, the first of several; None: it was skipped.
            scored: What was made of each of the group's rollouts, in their order.
            decode: Makes text of token ids; None: they are shown as numbers.
            error: Why the group was skipped.
        """
        ...


class CommandRun(LiveRun[ConfigT_co], Protocol[ConfigT_co]):
    """What a trainer is handed that executes commands (`input="commands"`).

    Clients number their commands, and the trainer gets them in the order of the numbers, whatever order they came in.
    It answers each one, before it writes a checkpoint that includes it: after a crash the commands behind the last
    checkpoint are executed again, and what was answered stands. It is asked to `finish` when it has taken all commands
    that have come.
    """

    def commands(self, after: int, wait: float) -> list[Command]:
        """The commands `after` + 1, `after` + 2, ... as far as all before them have come, some megabytes at a time;
        waits up to `wait` seconds for the first. Only rank 0 may call it.

        Args:
            after: The number of the last command that was executed; in the checkpoint it says where to go on.

        Raises:
            LogDamagedError: a record is not what was written.
            RuntimeError: the last checkpoint includes a command that was not answered, and whose client would wait for
                ever.
        """
        ...

    def result(self, command: Command, payload: bytes) -> bool:
        """Answer a command; it is on the disk when this returns, and its client hears of it. False: it was answered
        before, and that stands; another answer than that is reported as a warning.

        Raises:
            OSError: there was still no room after `limits.room_seconds`; the job will be paused.
        """
        ...

    def is_answered(self, number: int) -> bool:
        """Whether a command was answered, perhaps by an earlier attempt. Only for rank 0."""
        ...

    def publish(self, version: int) -> AbstractContextManager[Path]:
        """`with run.publish(version) as folder:` write the policy into `folder`, as a PEFT adapter or as a model; from
        then on new completions are sampled from it. Versions only grow."""
        ...

    def send_policy(self, version: int, weights: PolicyWeights) -> None:
        """The same, in the way that the engines of the job's model want it: as files, or by their backend's `Sender`.
        Every rank calls it at the same time. What was sent may end with the attempt: send the newest version again in
        the next one, and write a checkpoint of that step, which serves while no attempt runs."""
        ...
