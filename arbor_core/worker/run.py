"""What a trainer's function is handed: the job's directory, and the ways to report and to listen."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from arbor_core.config.convert import stored
from arbor_core.crash_points import crash_point
from arbor_core.jobdir import checkpoints, resume_points
from arbor_core.jobdir.documents import (
    JobDocument,
    import_object,
    read_desired,
    read_document,
    read_order,
    read_placement,
)
from arbor_core.jobdir.heartbeat import Heartbeat
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.jobdir.samples import SampledGroup, SampleLog, probed
from arbor_core.process.resources import (
    DISK_FULL_ERRNOS,
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    StorageLostError,
    is_disk_full,
    wait_for_disk_space,
)
from arbor_core.process.wakeup import URGENT, wake
from arbor_core.storage.event_log import EventLog
from arbor_core.types import (
    AttemptOrder,
    Checkpoint,
    CheckpointDiscarded,
    CheckpointEvent,
    CheckpointWithdrawn,
    ConfigT,
    Desired,
    Device,
    Event,
    GroupsSkipped,
    HyperparametersResolved,
    JobFailed,
    JobStopped,
    Level,
    MessageEvent,
    MetricsEvent,
    Placement,
    PolicyPublished,
    ResultEvent,
    ResumePointWritten,
    StepInputs,
)

PASSING = (MetricsEvent, MessageEvent, PolicyPublished, GroupsSkipped)
"""Events that a machine which loses its power may lose: what they tell is told again, or older than the rest."""
RETRY_SECONDS = 1.0
"""How often a worker tries again to report what the disk had no room for."""


@dataclass
class WorkerRun(Generic[ConfigT]):
    """What every trainer's function is handed (`arbor_core.types.Run`). What more depends on what it learns from, and
    is in `file_run`, `rollout_run` and `command_run`."""

    config: ConfigT
    document: JobDocument
    order: AttemptOrder
    placement: Placement
    rank: int = 0
    world_size: int = 1
    log: EventLog | None = field(init=False, default=None)
    samples: SampleLog | None = field(init=False, default=None)
    samples_missed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.files = AttemptDir(self.order.dir)
        self.job_files, self.attempt_dir, self.attempt = self.files.job, self.files.path, self.files.number
        self.dir, self.work = self.job_files.path, self.files.work
        self.work.mkdir(exist_ok=True)
        document = self.document
        self.job_id, self.seed = document.job_id, document.seed
        self.model = str(self.stored(document.model) or self.order.base)
        self.adapter = self.stored(document.adapter)
        self.bell, self.room_seconds = self.order.bell, self.order.room_seconds
        self.heartbeat = Heartbeat(self.files.heartbeat)
        self.micro_batch_share = self.placement.micro_batch_share
        self.threads = self.placement.threads  # as many as the job was made with: see Attempts.start
        if self.rank == 0:  # the other ranks report nothing
            self.log = EventLog(self.files.events)

    def stored(self, path: str | None) -> Path | None:
        """A path of the job's document: it is relative to the storage directory."""
        return self.job_files.storage / path if path else None

    @property
    def devices(self) -> tuple[Device, ...]:
        return self.placement.devices

    def emit(self, event: Event) -> None:
        """Write an event. What must not be lost reaches the disk before this returns.

        Raises:
            StorageLostError: it could not be written for `limits.room_seconds`, and not for want of room.
        """
        if self.log is None:
            return
        event.at = time.time()
        durable = not isinstance(event, PASSING)
        written = self.log.append(event, durable=durable)
        until = time.monotonic() + self.room_seconds
        while durable and not written:  # nobody else can say it: wait for room on the disk
            if (error := self.log.error) and error.errno not in DISK_FULL_ERRNOS and time.monotonic() > until:
                raise StorageLostError(error.errno, f"no storage for {self.room_seconds:g} s ({error.strerror})")
            self.heartbeat.beat_if_started()
            time.sleep(RETRY_SECONDS)
            written = self.log.flush(durable=True)
        if isinstance(event, MetricsEvent):
            self.heartbeat.beat()
        self.heartbeat.beat_if_started()
        crash_point(f"{event.type}.event")
        urgent = isinstance(event, PolicyPublished | GroupsSkipped)
        wake(self.bell, self.job_id + (URGENT if urgent else ""))

    def message(self, text: str, level: Level = "info", **data: Any) -> None:
        self.emit(MessageEvent(text, level, data=data))

    def metrics(self, step: int, total_steps: int, digest: str | None = None, /, **values: float) -> None:
        self.report_step(step, total_steps, digest, None, values)

    def report_step(
        self, step: int, total_steps: int, digest: str | None, fed: StepInputs | None, values: dict[str, float]
    ) -> None:
        """Write the numbers of a step."""
        shown = ", ".join(
            f"{name.replace('_', ' ').replace('train ', 'training ')}={value:.4g}"
            for name, value in values.items()
            if name.endswith("loss")
        )
        text = f"Step {step}/{total_steps}: {shown}"
        self.emit(MetricsEvent(text, step=step, total_steps=total_steps, values=values, digest=digest, fed=fed))

    def resolved(self, **hyperparameters: Any) -> None:
        self.emit(HyperparametersResolved("Hyperparameters resolved", hyperparameters=hyperparameters))

    @property
    def checkpoints_dir(self) -> Path:
        return self.job_files.checkpoints

    @contextmanager
    def checkpoint(self, step: int, /, **metrics: float) -> Iterator[Path]:
        with self._committing(step, metrics, self.room_seconds) as folder:
            yield folder

    def write_checkpoint(self, step: int, write: Callable[[Path], None], /, **metrics: float) -> None:
        pause, until = FIRST_WAIT_SECONDS, time.monotonic() + self.room_seconds
        while True:
            try:
                with self._committing(step, metrics, until - time.monotonic()) as folder:
                    write(folder)
            except OSError as error:
                left = until - time.monotonic()
                if left <= 0 or not is_disk_full(error, self.dir):
                    raise
                if pause == FIRST_WAIT_SECONDS:
                    self.message(f"The disk is full: the checkpoint of step {step} waits for room", "warn")
                self.heartbeat.beat_if_started()
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_WAIT_SECONDS)
            else:
                return

    @contextmanager
    def _committing(self, step: int, metrics: dict[str, float], room_seconds: float) -> Iterator[Path]:
        name = f"{step}-{self.attempt}"
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}  # JSON has no others
        needed = checkpoints.newest_bytes(self.checkpoints_dir)
        wait_for_disk_space(self.dir, needed, room_seconds, self.heartbeat.beat_if_started)
        with checkpoints.writing(self.checkpoints_dir / name, step, self.attempt, metrics) as folder:
            yield folder
        self.emit(CheckpointEvent(f"Checkpoint created at step {step}", step=step, dir=name, metrics=metrics))
        resume_points.forget(self.job_files.resume_points, step)

    def write_resume_point(self, step: int, write: Callable[[Path], None], /, **metrics: float) -> bool:
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        try:
            resume_points.write(self.job_files.resume_points, step, self.attempt, metrics, write)
        except OSError as error:
            if not is_disk_full(error, self.dir):
                raise
            self.message(f"The disk has no room for a resume point at step {step}: it is left out", "warn")
            return False
        self.emit(ResumePointWritten(f"Training can go on after step {step}", step=step))
        return True

    def give_name(self, name: str, step: int, metadata: Mapping[str, Any]) -> None:
        """Give the newest checkpoint of a step a name, in place of another that had it."""
        folder = checkpoints.give_name(self.checkpoints_dir, name, step)
        crash_point("name_checkpoint.linked")
        said = checkpoints.manifest(folder)
        named = CheckpointEvent(
            f"Checkpoint '{name}' is that of step {step}",
            step=step,
            dir=folder.name,
            metrics=said.metrics if said else {},
            name=name,
            metadata=dict(metadata),
        )
        self.emit(named)
        crash_point("name_checkpoint.told")

    def last_checkpoint(self) -> Checkpoint | None:
        found, withdrawals = checkpoints.newest_whole(self.checkpoints_dir)
        resumable = resume_points.newest(self.job_files.resume_points)
        for event in withdrawals if self.rank == 0 else ():  # the other ranks find the same, and leave it to this one
            self._withdraw(event)
        if resumable and resumable.step > (found.step if found else -1):
            return resumable
        if found is None and (withdrawals or checkpoints.aside(self.checkpoints_dir)):
            names = ", ".join(path.name for path in checkpoints.aside(self.checkpoints_dir))
            text = f"No checkpoint of the job is whole (damaged: {names}). Create the job again to start anew"
            raise JobFailed(text, code="checkpoint_corrupted")
        return found

    def withdraw_checkpoint(self, checkpoint: Checkpoint, reason: str) -> None:
        if self.rank == 0:
            self._withdraw(checkpoints.withdrawal(checkpoint.dir, reason))

    def _withdraw(self, event: CheckpointWithdrawn) -> None:
        self.emit(event)
        checkpoints.set_aside(self.checkpoints_dir / event.dir)  # after the event: what is offered is there

    def checkpoint_of(self, step: int) -> Checkpoint | None:
        return checkpoints.whole_of(self.checkpoints_dir, step)

    def keep_checkpoints(self, count: int) -> None:
        for folder in checkpoints.superseded(self.checkpoints_dir, count):
            self.emit(CheckpointDiscarded(f"Checkpoint {folder.name} removed", dir=folder.name))
            shutil.rmtree(folder)  # after the event: what is offered is there

    def report_probes(self, name: str, step: int, answers: Sequence[tuple[str, str]]) -> None:
        if self.rank == 0:
            self.keep_samples(lambda: probed(name, step, answers))

    def keep_samples(self, make: Callable[[], SampledGroup]) -> None:
        """Write something down for people to read, or leave it out where there is no room."""
        try:
            self.samples = self.samples or SampleLog(self.job_files.samples)
            self.samples.add(make())
        except OSError as failure:
            if not self.samples_missed:
                self.message(f"Samples are left out while they cannot be written: {failure.strerror}", "warn")
            self.samples_missed = True

    def stop_if_asked(self) -> None:
        if self.rank == 0:
            self.heartbeat.beat()
        wanted = self.desired()
        if wanted in ("pause", "cancel"):
            raise JobStopped(wanted)

    def desired(self) -> Desired:
        return read_desired(self.job_files)

    def finish(self, checkpoint: Checkpoint, trained_tokens: int, *, adapter: bool = False, **more: Any) -> None:
        result = ResultEvent(
            "The job has successfully completed",
            step=checkpoint.step,
            dir=checkpoint.dir.name,
            trained_tokens=trained_tokens,
            adapter=adapter,
            more=more,
        )
        self.emit(result)


RunT = TypeVar("RunT", bound=WorkerRun[Any])


def open_run(attempt_dir: Path, kind: type[RunT]) -> RunT:
    """Read an attempt's documents.

    Raises:
        ArborError: the directory was written by another version of Arbor.
    """
    attempt = AttemptDir(attempt_dir)
    document, order = read_document(attempt.job), read_order(attempt)
    config_type = import_object(order.config_type)
    return kind(
        config=msgspec.convert(stored(document.config, config_type), config_type),
        document=document,
        order=order,
        placement=read_placement(attempt),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )
