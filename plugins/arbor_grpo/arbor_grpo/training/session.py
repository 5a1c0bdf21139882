"""What happens between batches: waiting for groups, checkpoints, publishing the policy, stopping when asked.

A batch is trained in `num_iterations` steps. Only where one is done and the next not begun is a checkpoint a place to
go on from: with the position in the inbox it holds all that training depends on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from arbor_core import Checkpoint, CheckpointRequest, Fed, JobStopped, Run
from arbor_grpo import GrpoConfig

from . import metrics
from .intake import Gathering
from .publishing import Publisher
from .rows import Reader, Row, with_advantages
from .state import PLACE, REFERENCE, Finished, Place, Wanted

if TYPE_CHECKING:
    from .trainer import GroupTrainer

WAIT = 1.0
"""Seconds after which rank 0 looks up from an empty inbox even if nobody rang."""
BARREN = 10
"""After so many batches on end that teach nothing a warning says so."""
NOISE = 1e-6
"""Advantages up to here are rounding errors of equal rewards."""


class Session:
    """Of one attempt."""

    def __init__(self, run: Run[GrpoConfig], reader: Reader) -> None:
        self.run, self.reader = run, reader
        self.place = Place()
        self.trainer: GroupTrainer | None = None
        self.publisher: Publisher | None = None
        self.saved = self.published = -1
        """Steps whose checkpoint is written, whose weights are out."""
        self.fed: Fed | None = None
        self.measured: dict[str, float] = {}
        """Of the step, to be reported with it."""
        self.began = 0.0
        """When the step's batch was ready and its training began."""
        self.barren = 0
        """Batches on end that taught nothing."""
        self.reported: dict[str, float] = {}
        """Of the last step that was reported."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.trainer.state.global_step) if self.trainer else 0

    @staticmethod
    def place_of(checkpoint: Checkpoint) -> Place:
        return msgspec.json.decode((checkpoint.dir / PLACE).read_bytes(), type=Place)

    def resume(self, last: Checkpoint) -> None:
        self.place = self.place_of(last)
        self.saved, self.reported = last.step, dict(last.metrics)
        if self.trainer and self.trainer.ref_model is not None and (last.dir / REFERENCE).is_file():
            for name, tensor in load_file(last.dir / REFERENCE).items():
                self.trainer.ref_model.get_parameter(name).data.copy_(tensor)

    # --- before a batch -----------------------------------------------------------------------------------------------

    def next_rows(self) -> list[Row]:
        """Wait for the groups of the next batch; its rows.

        Raises:
            JobStopped: the job is to pause (its checkpoint is written) or was cancelled.
            Finished: the client has said that it is enough.
        """
        began = time.perf_counter()
        gathering = Gathering(self.place.position, self.step, self.run.config.num_iterations)
        complete = False
        while not complete:
            self.attend()
            passed, rejected = gathering.passed, len(gathering.rejected)
            records = self.run.groups(gathering.position, WAIT) if self.run.rank == 0 else []
            complete = gathering.take(self.shared(records), self.reader)
            if gathering.passed > passed:
                self.say_skipped(gathering, rejected)
        waited = time.perf_counter() - began
        rows, rewards = with_advantages([reading for _, reading in gathering.used], self.reader.config)
        self.look_for_differences(rows)
        self.place.position = gathering.position
        self.place.handled += gathering.handled
        self.place.tokens += sum(len(row.prompt) + len(row.completion) for row in rows)
        self.fed = gathering.fed
        self.measured = {
            **metrics.of_clients([record.group.metrics for record, _ in gathering.used]),
            **rewards.metrics(),
            **metrics.of_rows(rows),
            "staleness_mean": sum(gathering.ages) / len(gathering.ages),
            "staleness_max": max(gathering.ages),
            "groups_skipped": len(gathering.stale),
            "groups_rejected": len(gathering.rejected),
            "wait_time": waited,
        }
        return rows

    def say_skipped(self, gathering: Gathering, told: int) -> None:
        """Free the credits of groups that were passed over, and say what is wrong with those that are no good, but for
        the first `told`."""
        for record, why in gathering.rejected[told:]:
            text = f"The group of batch {record.group.id} cannot be trained on: {why}"
            self.run.message(text, "warn", group_rejected=record.start, batch_id=record.group.id, reason=why)
        self.run.passed_over(self.place.handled + gathering.passed)

    def look_for_differences(self, rows: list[Row]) -> None:
        """Say once that nothing is being learned from rewards, until there is something again."""
        self.barren = 0 if any(abs(row.advantage) > NOISE for row in rows) else self.barren + 1
        if self.barren == BARREN:
            text = (
                f"In the last {BARREN} batches no answer was better or worse than the others of its group: nothing is "
                "learned from rewards. Are the prompts far too hard or too easy, or do rewards not tell answers apart?"
            )
            self.run.message(text, "warn", batches_without_differences=BARREN)

    def shared(self, found: Any) -> Any:
        """What rank 0 has found, on every rank."""
        if self.run.world_size == 1:
            return found
        box = [found]
        broadcast_object_list(box)
        return box[0]

    def attend(self) -> None:
        """Do what is asked now: stop, or write checkpoints."""
        wanted = self.shared(self.asked() if self.run.rank == 0 else None)
        if wanted.stop == "cancel":
            raise JobStopped("cancel")
        every = self.run.config.checkpoint_steps
        due = bool(every) and self.step // int(every or 1) > max(0, self.saved) // int(every or 1)
        if wanted.names or due or wanted.stop:
            self.save()
        self.name(wanted.names)
        if wanted.stop == "pause":
            raise JobStopped("pause")
        if wanted.finish:
            raise Finished

    def asked(self) -> Wanted:
        try:
            self.run.stop_if_asked()
            stop = None
        except JobStopped as error:
            stop = str(error.desired)
        return Wanted(stop, self.run.desired() == "finish", tuple(self.run.asked_checkpoints()))

    def name(self, requests: tuple[CheckpointRequest, ...]) -> None:
        for request in requests:
            if self.run.rank == 0:
                self.run.name_checkpoint(request, self.step)

    def save(self) -> None:
        """Write the checkpoint of this step, if there is none yet."""
        if self.trainer is None or self.saved == self.step:
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
            self.run.passed_over(self.place.handled)

    def publish(self) -> None:
        """Let new completions be sampled from the weights of this step."""
        if self.publisher is None or self.published == self.step:
            return
        began = time.perf_counter()
        written = self.publisher.publish(self.step, self.place.handled)
        self.published = self.step
        self.measured |= {"publish_time": time.perf_counter() - began, "publish_bytes": written}

    def conclude(self) -> None:
        """After the last step: publish, write its checkpoint, and answer who waits for one."""
        if self.step:
            self.publish()
        self.save()
        self.name(tuple(self.shared(self.run.asked_checkpoints() if self.run.rank == 0 else ())))
