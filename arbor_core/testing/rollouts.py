"""What `check_trainer` asks of a trainer that learns from rollouts.

Clients are played here: groups are made up and put into the job's inbox, and what the trainer reports is awaited.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from arbor_core.jobdir import checkpoints, samples
from arbor_core.jobdir.groups import read
from arbor_core.jobdir.heartbeat import last_beat
from arbor_core.types import CheckpointEvent, Group, MetricsEvent, PolicyPublished, ResultEvent, Rollout

from .forks import Process
from .job_directory import ATTEMPT_SECONDS, STOP_SECONDS, JobDirectory
from .reports import (
    LAST_WORDS,
    check_cancel,
    check_checkpoints,
    check_numbers,
    check_paused,
    check_result,
    check_same,
)
from .resume_points import check_none_left, check_points
from .sending import FORGETFUL, check_sent_again

STEPS = 3
PAUSED_AFTER = 1
PROBES: Mapping[str, Any] = {"probes": ["Name a number."]}
"""Hyperparameters of those trainers whose named checkpoints answer prompts."""
SIZE = {"num_generations": 2, "groups_per_step": 2, "max_staleness": 1, "max_group_age": 1}
"""Of the groups that are made up here. One that was sampled before any step comes too late after the second."""
POLL_SECONDS = 0.05
PAUSE_HINT = (
    "in the loop that waits for clients call run.stop_if_asked(); when it raises JobStopped, write a checkpoint if "
    "its `desired` is 'pause', and let it pass"
)
FINISH_HINT = "loop until run.desired() is 'finish', then write a checkpoint and call run.finish"


def check_learning(make: Callable[..., JobDirectory], often: Mapping[str, Any]) -> None:
    """Run a job to its end, one that is paused and resumed, one that is killed, and one that is cancelled.

    Args:
        make: A new job of a name, with `SIZE` among its hyperparameters, and others.
        often: Hyperparameters with which there is a resume point after each step; empty: the trainer writes none.
    """
    whole, paused, cancelled = (make(name) for name in ("whole", "paused", "cancelled"))
    check_to_the_end(whole)
    check_resumed(paused, whole)
    check_killed(make("killed", **often), whole, points=bool(often))
    cancelled.send(*groups(1))
    check_cancel(cancelled)


def groups(step: int) -> tuple[Group, ...]:
    """Those of a step, sampled from the policy of the step before."""
    first, count = (step - 1) * SIZE["groups_per_step"], SIZE["groups_per_step"]
    return tuple(group(number, step - 1) for number in range(first, first + count))


def group(number: int, version: int) -> Group:
    """Answers to a question as text, of which the last is worth the most."""
    question = [{"role": "user", "content": f"Name the number after {number}."}]
    answers = [f"It is {number + further}." for further in range(SIZE["num_generations"], 0, -1)]
    rollouts = tuple(
        Rollout(trajectory=index, reward=float(index), messages=question, answer={"role": "assistant", "content": text})
        for index, text in enumerate(answers)
    )
    return Group(id=number, rollouts=rollouts, version=version)


class Attempt:
    """A worker that runs meanwhile."""

    def __init__(self, job: JobDirectory, process: Process) -> None:
        self.job, self.process = job, process

    def until(self, come: Callable[[], bool], what: str, patience: float | None = None) -> None:
        """Wait until something has been reported, for ATTEMPT_SECONDS or those of `patience`."""
        seconds = ATTEMPT_SECONDS if patience is None else patience
        deadline = time.monotonic() + seconds
        while not come():
            ended = self.process.poll()
            assert ended is None or come(), f"{what}: the worker ended with status {ended} instead:\n{self.job.log}"
            assert time.monotonic() < deadline, f"{what}: nothing of it in {seconds} seconds:\n{self.job.log}"
            time.sleep(POLL_SECONDS)

    def learn(self, step: int) -> None:
        """Send the groups of a step and wait until it is made and others may be sent for it."""
        self.job.send(*groups(step))
        self.until(lambda: steps_of(self.job)[-1:] == [step], f"step {step}, for which all groups were sent")
        self.until(lambda: self.handled() == self.sent(), f"the trainer has handled all {self.sent()} groups")

    def handled(self) -> int:
        """What the trainer has said of it last: see `Run.publish` and `Run.report_skipped`."""
        return (self.job.handled() or [0])[-1]

    def sent(self) -> int:
        """Groups in the inbox."""
        return sum(1 for _ in read(self.job.files.inbox, 0))

    def paused(self) -> None:
        """Ask a worker that waits for clients to pause, and wait until it has."""
        self.job.ask("pause")
        self.end("asked to pause", PAUSE_HINT, STOP_SECONDS)

    def end(self, what: str, hint: str = FINISH_HINT, patience: float | None = None) -> None:
        """Wait for the worker, for ATTEMPT_SECONDS or those of `patience`."""
        seconds = ATTEMPT_SECONDS if patience is None else patience
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log = self.job.log
            raise AssertionError(f"{what}, the worker still runs after {seconds} seconds: {hint}:\n{log}") from None
        assert status == 0, f"{what}, the worker ended with status {status}:\n{self.job.log}"


@contextmanager
def running(job: JobDirectory) -> Iterator[Attempt]:
    """Start an attempt, which is killed if it has not ended with the block."""
    process = job.start()
    try:
        yield Attempt(job, process)
    finally:
        process.kill()
        process.wait()


def steps_of(job: JobDirectory) -> list[int]:
    return [event.step for event in job.events(MetricsEvent)]


def check_to_the_end(job: JobDirectory) -> None:
    """A checkpoint is named while no group comes, steps are made and their policies published, what is too old is
    skipped, and the job ends when that is asked for."""
    with running(job) as attempt:
        check_named(attempt)
        for step in range(1, STEPS):
            attempt.learn(step)
        check_report_skipped(attempt)
        attempt.learn(STEPS)
        job.ask("finish")
        attempt.end("asked to finish")
    steps = steps_of(job)
    assert steps == list(range(1, STEPS + 1)), f"the steps are {steps}; expected each once, from 1 to {STEPS}"
    for event in job.events(MetricsEvent):
        check_numbers(event)
    check_fed(job, job.events(MetricsEvent))
    check_checkpoints(job)
    result = check_result(job)
    check_published(job, result)
    if PROBES.keys() <= job.hyperparameters.keys():
        check_probes(job)
    assert result.step == STEPS, f"the result's checkpoint is of step {result.step}, the last step was {STEPS}"


def check_named(attempt: Attempt) -> None:
    """Whoever asks for a checkpoint gets one, though no group comes."""
    job = attempt.job
    beat = job.files.attempt(job.attempts).heartbeat
    attempt.until(lambda: last_beat(beat) is not None, "the trainer waits for clients, with run.groups or run.commands")
    job.request_checkpoint("first", why="conformance")
    what = "the checkpoint 'first' (of each run.asked_checkpoints() write one, then call run.name_checkpoint)"
    attempt.until(lambda: any(e.name == "first" for e in job.events(CheckpointEvent)), what, STOP_SECONDS)
    event = next(event for event in job.events(CheckpointEvent) if event.name == "first")
    said = event.metadata
    assert said == {"why": "conformance"}, f"the checkpoint's metadata came back as {said}: hand on the request itself"
    reason = checkpoints.fault(job.files.checkpoints / event.dir)
    assert reason is None, f"the checkpoint 'first': {reason}"


def check_probes(job: JobDirectory) -> None:
    """What each named checkpoint answers to the job's probes is among its samples."""
    named = {(f"probe:{event.name}", event.step) for event in job.events(CheckpointEvent) if event.name}
    kept = {(group.label, group.step) for _, group in samples.newest_first(job.files.samples)}
    missing = sorted(named - kept)
    assert not missing, f"of the named checkpoints {missing} have answered no probes: call run.report_probes for each"


def check_report_skipped(attempt: Attempt) -> None:
    """A group that is too old is skipped, and said to be handled before there are others for a step."""
    steps = steps_of(attempt.job)
    attempt.job.send(group(1000, version=0))
    attempt.until(lambda: attempt.handled() == attempt.sent(), "a group that is too old is counted as handled")
    assert steps_of(attempt.job) == steps, "a step was made of a group that is too old"


def check_fed(job: JobDirectory, events: list[MetricsEvent]) -> None:
    """Each step says of which groups it was made: those that came first and were not too old, and no others."""
    records = {record.start: record for record in read(job.files.inbox, 0)}
    ids = {number: step for step in range(1, STEPS + 1) for number in (g.id for g in groups(step))}
    position = 0
    for event in events:
        fed, step = event.fed, event.step
        assert fed, f"metrics of step {step} do not say what it was made of: pass StepInputs to run.metrics"
        mine = [(start, records[start].crc) for start in records if ids.get(records[start].group.id) == step]
        told = list(fed.groups)
        assert told == mine, f"step {step} says it was made of {told} (position, CRC-32); expected {mine}"
        between = [r for r in records.values() if position <= r.start < fed.end]
        skipped = [record.start for record in between if record.group.id not in ids]
        assert list(fed.skipped) == skipped, f"step {step} says it skipped {fed.skipped}; expected {skipped}"
        used = len(between) - len(skipped)
        assert used == len(told), f"step {step} ends at {fed.end}, before which are {used} groups for it"
        position = fed.end


def check_published(job: JobDirectory, result: ResultEvent) -> None:
    """Versions and counts of handled groups only grow, and the last policy is there, of the same kind as the result."""
    handled = job.handled()
    assert handled == sorted(handled), f"the count of handled groups falls: {handled}"
    published = job.events(PolicyPublished)
    versions = [event.version for event in published]
    assert versions == sorted(versions), f"versions are published out of order: {versions}"
    assert versions[-1:] == [STEPS], f"the versions published are {versions}; expected the last to be {STEPS}"
    folder = job.files.weights / published[-1].dir
    assert any(folder.iterdir()), f"the published policy {folder.name} is empty"
    adapters = [(at / "adapter_config.json").is_file() for at in (folder, job.files.checkpoints / result.dir)]
    assert adapters[0] == adapters[1], "of the published policy and the result, one is a PEFT adapter and one is not"


def check_resumed(job: JobDirectory, whole: JobDirectory) -> None:
    """Paused while no group comes, with a checkpoint; resumed, it makes the same steps as a run without a pause, and
    sends the policy again that was sent."""
    job.sender = FORGETFUL
    with running(job) as attempt:
        for step in range(1, PAUSED_AFTER + 1):
            attempt.learn(step)
        attempt.paused()
    check_paused(job)
    saved = [event.step for event in job.events(CheckpointEvent)]
    assert saved[-1:] == [PAUSED_AFTER], f"paused after step {PAUSED_AFTER}, with checkpoints of {saved}"
    before = job.events(MetricsEvent)
    for step in range(PAUSED_AFTER + 1, STEPS):
        job.send(*groups(step))
    job.send(group(1000, version=0), *groups(STEPS))  # all of it waits when the job goes on
    job.ask("run")
    with running(job) as attempt:
        attempt.until(lambda: steps_of(job)[-1:] == [STEPS], f"step {STEPS} of the resumed run")
        job.ask("finish")
        attempt.end("resumed and asked to finish")
    check_same([*before, *job.events(MetricsEvent)], whole.events(MetricsEvent))
    check_sent_again(job)
    check_result(job)
    said = [event.type for event in job.events(*LAST_WORDS)]
    assert said == ["result"], f"the resumed run reported {said}; expected a result"


def check_killed(job: JobDirectory, whole: JobDirectory, *, points: bool) -> None:
    """Killed, and asked to finish before it runs again: what it had learned is in its result, and no more. A checkpoint
    that a client wants meanwhile is of nothing less.

    Args:
        points: There is to be a resume point after each step.
    """
    with running(job) as attempt:
        for step in range(1, STEPS):
            attempt.learn(step)
        check_report_skipped(attempt)
    check_points(job, list(range(1, STEPS)) if points else None)
    job.send(*groups(STEPS))
    job.request_checkpoint("late")
    job.ask("finish")
    with running(job) as attempt:
        attempt.end("killed, and asked to finish")
    result = check_result(job)
    check_none_left(job)
    assert result.step == STEPS - 1, (
        f"killed after step {STEPS - 1} and asked to finish, the result is that of step {result.step}: ask "
        "run.desired() after groups are taken, and say with run.publish or run.report_skipped how many are handled"
    )
    named = [event.step for event in job.events(CheckpointEvent) if event.name == "late"]
    assert named in ([], [STEPS - 1]), (
        f"killed after step {STEPS - 1}, it gave a name to the checkpoint of step {named}"
    )
    newest = {e.step: e for n in range(1, job.attempts + 1) for e in job.events(MetricsEvent, attempt=n)}
    check_same(list(newest.values()), whole.events(MetricsEvent)[:-1], "it was killed")
