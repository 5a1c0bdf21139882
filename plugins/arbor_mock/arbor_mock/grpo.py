"""The trainer that learns from rollouts: steps are simulated; the inbox, the policies and the checkpoints are real."""

import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec

from arbor_core import Checkpoint, JobFailed, JobStopped, Record, ResumeClock, RolloutRun, Scored, StepInputs

from .config import MockGrpoConfig
from .train import STATE, strike, write_adapter

WAIT_SECONDS = 1.0
"""How long it waits for groups before it looks for other wishes. The bell ends the wait early."""


class Learned(msgspec.Struct):
    """The trainer after a number of steps: a function of the inbox up to `position`, and of nothing else."""

    step: int = 0
    position: int = 0
    """Where the inbox goes on."""
    handled: int = 0
    """Groups that were trained on or skipped."""
    tokens: int = 0
    digest: str = ""
    """Stands for the parameters: a hash over the groups, step by step."""


class Batch(msgspec.Struct):
    """The groups of the step that comes next, as far as they are there."""

    end: int
    groups: list[Record] = []
    skipped: list[int] = []


def train(run: RolloutRun[MockGrpoConfig]) -> None:
    """Make steps of the groups that clients send, in a process of its own.

    Raises:
        JobFailed: `fault` says so, or a checkpoint cannot be read back.
        JobStopped: the job is to pause (a checkpoint was written) or was cancelled.
    """
    learner = Learner(run)
    strike(run, learner.learned.step, kill)
    while not learner.done():
        learner.work()
    run.finish(learner.saved(), learner.learned.tokens, adapter=True)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


class Learner:
    """The state of one attempt."""

    def __init__(self, run: RolloutRun[MockGrpoConfig]) -> None:
        self.run, self.config = run, run.config
        self.last = run.last_checkpoint()
        self.learned = Learned()
        if self.last:
            self.learned = msgspec.json.decode((self.last.dir / STATE).read_bytes(), type=Learned)
            run.message(f"Resumed after step {self.learned.step}")
            self.publish()  # what was published may be gone
        self.batch = Batch(self.learned.position)
        self.clock = ResumeClock(self.config.resume_seconds)

    def done(self) -> bool:
        """Whether nothing is left to do."""
        enough = self.config.max_steps is not None and self.learned.step >= self.config.max_steps
        return enough or self.run.desired() == "finish"

    def work(self) -> None:
        """Do what clients wait for, then a step if there are groups for one."""
        self.name_checkpoints()
        try:
            self.run.stop_if_asked()
        except JobStopped as stop:
            if stop.desired == "pause":
                self.saved()
            raise
        if self.gather():
            time.sleep(self.config.step_seconds)
            self.make_step()

    def gather(self) -> bool:
        """Take groups in order of arrival; whether there are enough for a step."""
        skipped = len(self.batch.skipped)
        for record in self.run.groups(self.batch.end, WAIT_SECONDS):
            self.batch.end = record.end
            limit = self.config.max_staleness if self.config.max_group_age is None else self.config.max_group_age
            if (age := self.learned.step - record.group.version) > limit:
                self.batch.skipped.append(record.start)
                self.run.report_samples(record, decode=text, error=f"it is {age} batches old (max_group_age: {limit})")
            else:
                self.batch.groups.append(record)
            if len(self.batch.groups) == self.config.groups_per_step:
                return True
        if len(self.batch.skipped) > skipped:
            self.run.report_skipped(self.learned.handled + len(self.batch.skipped))
        return False

    def make_step(self) -> None:
        """Make a step of the batch and publish what came of it."""
        batch, before = self.batch, self.learned
        digest = blake2b(before.digest.encode(), digest_size=16)
        for record in batch.groups:
            digest.update(record.start.to_bytes(8, "little") + record.crc.to_bytes(4, "little"))
        self.learned = Learned(
            before.step + 1,
            batch.end,
            before.handled + len(batch.groups) + len(batch.skipped),
            before.tokens + sum(map(tokens, batch.groups)),
            digest.hexdigest(),
        )
        fed = StepInputs(batch.end, tuple((record.start, record.crc) for record in batch.groups), tuple(batch.skipped))
        values = measures(self.learned, batch, before.step)
        rate = {"learning_rate": self.config.learning_rate}
        for record in batch.groups:
            self.run.report_samples(record, self.learned.step, scores(record), text)
        self.run.metrics(
            self.learned.step, self.config.max_steps or self.learned.step, self.learned.digest, fed, **values, **rate
        )
        self.batch = Batch(batch.end)
        self.publish()
        if self.config.checkpoint_steps and self.learned.step % self.config.checkpoint_steps == 0:
            self.saved()
        elif self.clock.is_due():
            with self.clock.writing():
                self.run.write_resume_point(self.learned.step, self.write)
        strike(self.run, self.learned.step, kill)

    def publish(self) -> None:
        self.run.send_policy(self.learned.step, self.learned.handled, self)

    module = None

    def write(self, folder: Path | None) -> None:
        """Write the policy, as a `PolicyWeights`."""
        if folder:
            write(folder, self.run.model, self.learned)

    def name_checkpoints(self) -> None:
        """Answer the clients that wait for a checkpoint of this step."""
        for request in self.run.asked_checkpoints():
            self.saved()
            self.run.name_checkpoint(request, self.learned.step)

    def saved(self) -> Checkpoint:
        """The checkpoint of this step, written if there is none."""
        if self.last is None or self.last.resume_only or self.last.step != self.learned.step:
            with self.clock.writing(), self.run.checkpoint(self.learned.step) as folder:
                write(folder, self.run.model, self.learned)
            self.last = self.run.last_checkpoint()
        if self.last is None:
            raise JobFailed(
                f"The checkpoint of step {self.learned.step} cannot be read back", code="checkpoint_corrupted"
            )
        return self.last


def write(folder: Path, model: str, learned: Learned) -> None:
    """A small adapter, and what the trainer goes on from."""
    write_adapter(folder, model, learned.digest)
    (folder / STATE).write_bytes(msgspec.json.encode(learned))


def tokens(record: Record) -> int:
    """Tokens of a group's completions; words where they came as text."""
    return sum(
        len(rollout.completion) // 4 or len(str((rollout.answer or {}).get("content", "")).split())
        for rollout in record.group.rollouts
    )


def text(ids: list[int]) -> str:
    """Tokens of the simulated engine are bytes."""
    return bytes(ids).decode(errors="replace")


def scores(record: Record) -> list[Scored]:
    """The advantage of each rollout: its reward less the mean of its group's."""
    mean = statistics.fmean([reward for group in rewards([record]) for reward in group] or [0.0])
    return [Scored(None if one.reward is None else one.reward - mean) for one in record.group.rollouts]


def rewards(groups: Sequence[Record]) -> Iterator[list[float]]:
    """The rewards of each group: one a trajectory."""
    for record in groups:
        of = {rollout.trajectory: rollout.reward for rollout in record.group.rollouts if rollout.reward is not None}
        if of:
            yield list(of.values())


def measures(learned: Learned, batch: Batch, before: int) -> dict[str, float]:
    """The numbers of a step: a function of what it was made of."""
    given = list(rewards(batch.groups))
    spread = [statistics.pstdev(group) for group in given]
    values: dict[str, float] = {}
    for record in batch.groups:  # what clients measured; of two the later says it
        values |= record.group.metrics
    values |= {
        "train_loss": random.Random(learned.digest).gauss(0.0, 0.02),
        "staleness": statistics.fmean(before - record.group.version for record in batch.groups),
        "groups_skipped": float(len(batch.skipped)),
    }
    if given:
        values["reward"] = statistics.fmean(reward for group in given for reward in group)
        values["reward_std"] = statistics.fmean(spread)
        values["frac_reward_zero_std"] = sum(value == 0 for value in spread) / len(spread)
    return values
