"""Learning from rollouts: REINFORCE (Williams 1992) on a table of logits, by letter and the letter before it."""

import math
from collections import defaultdict
from itertools import pairwise
from statistics import fmean

import msgspec

from arbor_core import Checkpoint, JobStopped, LiveRun, Record, RolloutRun, StepInputs

from . import ReinforceConfig

LETTERS = [chr(code) for code in range(32, 127)] + ["$"]


class Learner(msgspec.Struct):
    """All that training depends on: a function of the inbox up to `position`."""

    step: int = 0
    position: int = 0
    handled: int = 0
    tokens: int = 0
    table: dict[str, float] = {}

    def probabilities(self, first: str) -> dict[str, float]:
        weights = {letter: math.exp(self.table.get(first + letter, 0.0)) for letter in LETTERS}
        total = sum(weights.values())
        return {letter: weight / total for letter, weight in weights.items()}

    def learn(self, groups: list[Record], rate: float) -> float:
        """Make answers that are better than their group's mean likelier. Returns the loss."""
        gradient, losses = defaultdict(float), []
        for rollouts in (record.group.rollouts for record in groups):
            mean = fmean(rollout.reward for rollout in rollouts)
            for rollout in rollouts:
                advantage = rollout.reward - mean
                for first, second in pairwise(f"^{rollout.answer['content']}$"):
                    probabilities = self.probabilities(first)
                    losses.append(-advantage * math.log(probabilities.get(second, 1e-9)))
                    for letter, probability in probabilities.items():
                        gradient[first + letter] += advantage * ((letter == second) - probability)
        for pair, slope in gradient.items():
            self.table[pair] = self.table.get(pair, 0.0) + rate * slope
        self.tokens += len(losses)
        return fmean(losses)


def train(run: RolloutRun[ReinforceConfig]) -> None:
    last = run.last_checkpoint()
    learner = msgspec.json.decode((last.dir / "learner.json").read_bytes(), type=Learner) if last else Learner()
    used, skipped, position = [], [], learner.position
    while run.desired() != "finish":
        serve_requests(run, learner)
        before = len(skipped)
        for record in run.groups(position, wait=1.0):
            position = record.end
            (used if fits(record, learner.step, run.config) else skipped).append(record)
            if len(used) == run.config.groups_per_step:
                break
        if len(used) == run.config.groups_per_step:
            learner.step, learner.position = learner.step + 1, position
            learner.handled += len(used) + len(skipped)
            loss = learner.learn(used, run.config.learning_rate)
            inputs = StepInputs(position, tuple((r.start, r.crc) for r in used), tuple(r.start for r in skipped))
            for record in used:
                run.report_samples(record, learner.step)
            run.metrics(learner.step, learner.step, None, inputs, train_loss=loss)
            with run.publish(learner.step, learner.handled) as folder:
                (folder / "learner.json").write_bytes(msgspec.json.encode(learner))
            used, skipped = [], []
        elif len(skipped) > before:
            run.report_skipped(learner.handled + len(skipped))
    run.finish(save(run, learner), learner.tokens)


def fits(record: Record, step: int, config: ReinforceConfig) -> bool:
    """Whether a group is young enough, and came as text with a reward for each answer."""
    limit = config.max_staleness if config.max_group_age is None else config.max_group_age
    whole = all(rollout.answer and rollout.reward is not None for rollout in record.group.rollouts)
    return whole and step - record.group.version <= limit


def serve_requests(run: LiveRun, learner: msgspec.Struct) -> None:
    """Name the checkpoints that clients want; pause or stop where that is wanted."""
    for request in run.asked_checkpoints():
        save(run, learner)
        run.name_checkpoint(request, learner.step)
    try:
        run.stop_if_asked()
    except JobStopped as stop:
        if stop.desired == "pause":
            save(run, learner)
        raise


def save(run: LiveRun, learner: msgspec.Struct) -> Checkpoint:
    """The checkpoint of this step, written if there is none."""
    last = run.last_checkpoint()
    if last is None or last.step != learner.step:
        with run.checkpoint(learner.step) as folder:
            (folder / "learner.json").write_bytes(msgspec.json.encode(learner))
    return run.last_checkpoint()
