"""What happens between batches: waiting for groups, checkpoints, publishing the policy, pausing and cancelling.

A batch is trained in `num_iterations` steps. Only where one is done and the next not begun is a checkpoint a place to
go on from: with the position in the inbox it holds all that training depends on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import msgspec
from accelerate.utils import broadcast_object_list
from arbor_trl.probes import answer_probes

from arbor_core import Checkpoint, CheckpointRequest, JobStopped, Record, RolloutRun, Scored, StepInputs
from arbor_grpo import GrpoConfig

from . import metrics
from .intake import StepGroups
from .publishing import Publisher
from .rows import Reader, Row, with_advantages
from .trainer import GroupTrainer

PROGRESS = "inbox.json"
"""File in a checkpoint: how far the inbox was used."""
WAIT = 1.0
"""Seconds after which rank 0 looks up from an empty inbox even if nothing woke it."""
WITHOUT_DIFFERENCES = 10
"""A warning says so after this many batches in a row that teach nothing."""
NOISE = 1e-6
"""Advantages up to here are rounding errors of equal rewards."""


class Progress(msgspec.Struct):
    """How far the inbox was used."""

    position: int = 0
    """Where in the inbox to go on."""
    handled: int = 0
    """Groups that were trained on or skipped."""
    tokens: int = 0
    """Of all sequences that were trained on."""


def progress_of(checkpoint: Checkpoint) -> Progress:
    return msgspec.json.decode((checkpoint.dir / PROGRESS).read_bytes(), type=Progress)


class Requests(msgspec.Struct):
    """What clients and the server want of the run now; rank 0 reads it and all ranks do it."""

    stop: str | None = None
    """`pause` or `cancel`."""
    finish: bool = False
    checkpoints: tuple[CheckpointRequest, ...] = ()
    resume_point: bool = False
    """It is time for one."""


class FinishRequested(Exception):
    """Raised where training is to end now, and end well."""


class Session:
    """What happens between the batches of one attempt; the trainer's source of batches."""

    def __init__(
        self, run: RolloutRun[GrpoConfig], reader: Reader, trainer: GroupTrainer, publisher: Publisher
    ) -> None:
        self.run, self.reader, self.trainer, self.publisher = run, reader, trainer, publisher
        self.progress = Progress()
        self.saved = self.published = -1
        """Steps whose checkpoint is written, whose weights are out."""
        self.resumable = 0
        """The step that another attempt could go on after."""
        self.probed = -1
        """The step whose policy has answered the probes."""
        self.inputs: StepInputs | None = None
        """What the step's batch was made of."""
        self.unreported: list[tuple[Record, list[Row]]] = []
        """Groups of the batch with their rows, until their samples are reported."""
        self.measured: dict[str, float] = {}
        """Of the step, to be reported with it."""
        self.without_differences = 0
        """Batches in a row that taught nothing."""
        self.reported: dict[str, float] = {}
        """Of the last step that was reported."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.trainer.state.global_step)

    def resume(self, last: Checkpoint) -> None:
        """Go on after a checkpoint."""
        self.progress = progress_of(last)
        self.resumable, self.reported = last.step, dict(last.metrics)
        self.saved = -1 if last.resume_only else last.step
        self.trainer.load_reference(last.dir)

    def checkpoint_metrics(self) -> Mapping[str, float]:
        return self.reported

    def checkpoint_files(self) -> Mapping[str, bytes]:
        return {PROGRESS: msgspec.json.encode(self.progress)}

    # --- before a batch -----------------------------------------------------------------------------------------------

    def next_rows(self) -> list[Row]:
        """Wait for the groups of the next batch; its rows.

        Raises:
            JobStopped: the job is to pause (its checkpoint is written) or was cancelled.
            FinishRequested: the client wants no more steps.
        """
        began = time.perf_counter()
        groups = StepGroups(self.progress.position, self.step, self.run.config.num_iterations)
        complete = False
        while not complete:
            self.serve_requests()
            stale, rejected = len(groups.stale), len(groups.rejected)
            records = self.run.groups(groups.position, WAIT) if self.run.rank == 0 else []
            complete = groups.take(self.of_rank_0(records), self.reader)
            if groups.skipped > stale + rejected:
                self.report_skipped(groups, stale, rejected)
        waited = time.perf_counter() - began
        rows, rewards = with_advantages([rows for _, rows in groups.used], self.reader.config)
        self.warn_without_differences(rows)
        left = iter(rows)
        self.unreported = [(record, list(islice(left, len(found.rows)))) for record, found in groups.used]
        self.progress.position = groups.position
        self.progress.handled += groups.handled
        self.progress.tokens += sum(len(row.prompt) + len(row.completion) for row in rows)
        self.inputs = groups.inputs
        self.measured = {
            **metrics.client_metrics([record.group.metrics for record, _ in groups.used]),
            **rewards.metrics(),
            **metrics.row_metrics(rows),
            "staleness_mean": sum(groups.ages) / len(groups.ages),
            "staleness_max": max(groups.ages),
            "groups_skipped": len(groups.stale),
            "groups_rejected": len(groups.rejected),
            "wait_time": waited,
        }
        return rows

    def report_skipped(self, groups: StepGroups, stale: int, rejected: int) -> None:
        """Free the credits of groups that were skipped, and warn of those that cannot be used; the first `stale` that
        were too old and `rejected` that could not be used are reported already."""
        for record in groups.stale[stale:]:
            why = f"it is {groups.age(record)} batches old (max_group_age: {self.reader.config.oldest})"
            self.run.report_samples(record, decode=self.text, error=why)
        for record, why in groups.rejected[rejected:]:
            text = f"The group of batch {record.group.id} cannot be trained on: {why}"
            self.run.message(text, "warn", group_rejected=record.start, batch_id=record.group.id, reason=why)
            self.run.report_samples(record, decode=self.text, error=why)
        self.run.report_skipped(self.progress.handled + groups.skipped)

    def warn_without_differences(self, rows: list[Row]) -> None:
        """Say once that nothing is being learned from rewards, until there is something again."""
        different = any(abs(row.advantage) > NOISE for row in rows)
        self.without_differences = 0 if different else self.without_differences + 1
        if self.without_differences == WITHOUT_DIFFERENCES:
            text = (
                f"In the last {WITHOUT_DIFFERENCES} batches no answer was better or worse than the others of its "
                "group: nothing is learned from rewards. Are the prompts far too hard or too easy, or do rewards not "
                "tell answers apart?"
            )
            self.run.message(text, "warn", batches_without_differences=WITHOUT_DIFFERENCES)

    def of_rank_0(self, found: Any) -> Any:
        """What rank 0 has found, on every rank."""
        if self.run.world_size == 1:
            return found
        box = [found]
        broadcast_object_list(box)
        return box[0]

    def serve_requests(self) -> None:
        """Stop, or write checkpoints, where somebody wants that."""
        requests = self.of_rank_0(self.read_requests() if self.run.rank == 0 else None)
        if requests.stop == "cancel":
            raise JobStopped("cancel")
        every = self.run.config.checkpoint_steps
        due = bool(every) and self.step // int(every or 1) > max(self.resumable, self.saved) // int(every or 1)
        if requests.checkpoints or due or requests.stop:
            self.save()
        elif requests.resume_point:
            self.trainer.save_resume_point()
            self.resumable = self.step
        self.name_checkpoint(requests.checkpoints)
        if requests.stop == "pause":
            raise JobStopped("pause")
        if requests.finish:
            raise FinishRequested

    def read_requests(self) -> Requests:
        try:
            self.run.stop_if_asked()
            stop = None
        except JobStopped as error:
            stop = str(error.desired)
        resume_point = self.step > max(self.resumable, self.saved) and self.trainer.resume_clock.is_due()
        return Requests(stop, self.run.desired() == "finish", tuple(self.run.asked_checkpoints()), resume_point)

    def name_checkpoint(self, requests: tuple[CheckpointRequest, ...]) -> None:
        """Give this step's checkpoint the names that clients want."""
        for request in requests:
            if self.run.rank == 0:
                self.run.name_checkpoint(request, self.step)
                self.answer_probes(request.name)

    def answer_probes(self, name: str) -> None:
        """Have the present policy answer the job's probes, as the checkpoint of this name."""
        if self.probed != self.step:
            self.probed = self.step
            answer_probes(self.run, self.trainer, name, self.step)

    def save(self) -> None:
        """Write the checkpoint of this step, if there is none yet."""
        if self.saved == self.step:
            return
        self.trainer.save()
        self.saved = self.step
        if self.run.rank == 0 and self.run.config.keep_checkpoints:
            self.run.keep_checkpoints(self.run.config.keep_checkpoints)

    # --- after a step -------------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Publish the policy where a batch is done."""
        if self.step % self.run.config.num_iterations:
            return
        batches = self.step // self.run.config.num_iterations
        if batches % self.run.config.publish_steps == 0:
            self.publish()
        elif self.run.rank == 0:
            self.run.report_skipped(self.progress.handled)

    def report_samples(self) -> None:
        """Keep the rollouts of the batch for people to read, after the first of its steps."""
        for record, rows in self.unreported:
            scored = [Scored(row.advantage, len(row.prompt), len(row.completion)) for row in rows]
            self.run.report_samples(record, self.step, scored, self.text)
        self.unreported = []

    def text(self, ids: list[int]) -> str:
        """Tokens as text, special ones included."""
        return str(self.trainer._tokenizer.decode(ids))

    def publish(self) -> None:
        """Let new completions be sampled from the weights of this step."""
        if self.published == self.step:
            return
        began = time.perf_counter()
        written = self.publisher.publish(self.step, self.progress.handled)
        self.published = self.step
        self.measured |= {"publish_time": time.perf_counter() - began, "publish_bytes": written}

    def conclude(self) -> None:
        """After the last step: publish, write its checkpoint, and name it for clients that wait for one."""
        if self.step:
            self.publish()
        self.save()
        self.name_checkpoint(tuple(self.of_rank_0(self.run.asked_checkpoints() if self.run.rank == 0 else ())))
        if self.run.rank == 0:
            self.answer_probes("result")
