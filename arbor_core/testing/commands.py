"""What `check_trainer` asks of a trainer that executes commands.

A client is played here: the commands are put into the job's inbox, and results are awaited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from arbor_core.jobdir import checkpoints
from arbor_core.types import CheckpointEvent

from .job_directory import JobDirectory
from .reports import LAST_WORDS, check_cancel, check_checkpoints, check_paused, check_result
from .resume_points import check_none_left, check_points
from .rollouts import Attempt, check_named, running
from .sending import FORGETFUL, check_sent_again


def check_executing(make: Callable[..., JobDirectory], commands: Sequence[bytes], often: Mapping[str, Any]) -> None:
    """Run a job to its end, one that is paused and resumed, one that is killed and finished, and one that is cancelled.

    Args:
        make: Makes a new job of a name and hyperparameters.
        commands: Their payloads, in order.
        often: Hyperparameters with which there is a resume point after each command; empty: the trainer writes none.
    """
    assert len(commands) >= 3, f"check_trainer: {len(commands)} commands were given, at least 3 are needed"
    whole, paused, cancelled = (make(name) for name in ("whole", "paused", "cancelled"))
    check_to_the_end(whole, commands)
    expected = whole.results()
    check_resumed(paused, commands, expected)
    check_killed(make("killed", **often), commands, expected)
    cancelled.command(1, commands[0])
    check_cancel(cancelled)


def until_answered(attempt: Attempt, number: int) -> None:
    """Wait until a command has its result."""
    attempt.until(lambda: number in attempt.job.results(), f"the result of command {number}")


def check_to_the_end(job: JobDirectory, commands: Sequence[bytes]) -> None:
    """A checkpoint is named while no command comes; commands that come in another order are executed in theirs, and
    answered once; the job ends when that is asked for, and not before all that came is answered."""
    with running(job) as attempt:
        check_named(attempt)
        for number in range(len(commands) - 1, 1, -1):
            job.command(number, commands[number - 1])
        job.command(1, commands[0])
        until_answered(attempt, len(commands) - 1)
        job.command(len(commands), commands[-1])
        job.ask("finish")
        attempt.end("asked to finish")
    there = sorted(job.results())
    assert there == list(range(1, len(commands) + 1)), (
        f"asked to finish, with {len(commands)} commands in the inbox, there are results of {there}: take commands "
        "while run.desired() is not finish, and answer each with run.result"
    )
    check_checkpoints(job)
    check_result(job)


def check_resumed(job: JobDirectory, commands: Sequence[bytes], expected: dict[int, bytes]) -> None:
    """Paused while no command comes, with a checkpoint; resumed, it answers as a run without a pause."""
    with running(job) as attempt:
        job.command(1, commands[0])
        until_answered(attempt, 1)
        attempt.paused()
    check_paused(job)
    saved = [event.dir for event in job.events(CheckpointEvent)]
    assert saved, "paused without a checkpoint"
    reason = checkpoints.fault(job.files.checkpoints / saved[-1])
    assert reason is None, f"the checkpoint {saved[-1]}: {reason}"
    for number, payload in enumerate(commands[1:], 2):
        job.command(number, payload)
    job.ask("run")
    with running(job) as attempt:
        until_answered(attempt, len(commands))
        job.ask("finish")
        attempt.end("resumed and asked to finish")
    check_same(job, expected, "a pause")
    check_result(job)
    said = [event.type for event in job.events(*LAST_WORDS)]
    assert said == ["result"], f"the resumed run reported {said}; expected a result"


def check_killed(job: JobDirectory, commands: Sequence[bytes], expected: dict[int, bytes]) -> None:
    """Killed, and asked to finish before it runs again: what was answered stands, and its effect is there again, as is
    the policy that was sent."""
    job.sender = FORGETFUL
    with running(job) as attempt:
        for number, payload in enumerate(commands[:-1], 1):
            job.command(number, payload)
        until_answered(attempt, len(commands) - 1)
    check_points(job, most=2)
    told = job.results()
    job.command(len(commands), commands[-1])
    job.ask("finish")
    with running(job) as attempt:
        attempt.end("killed, and asked to finish")
    now = job.results()
    assert told.items() <= now.items(), f"results that were told have changed: {told}, now {now}"
    check_same(job, expected, "it was killed")
    check_sent_again(job)
    check_result(job)
    check_none_left(job)


def check_same(job: JobDirectory, expected: dict[int, bytes], why: str) -> None:
    """Results of a run that was interrupted and of one that was not."""
    now = job.results()
    other = [number for number in expected if now.get(number) != expected[number]]
    assert not other, (
        f"after {why} command {other[0]} is answered {now.get(other[0])!r}, without {expected[other[0]]!r}: go on "
        "where the checkpoint is, with all that the commands before it have done"
    )
    again = [event.message for event in job.events() if "executed again with another result" in event.message]
    assert not again, f"after {why}: {again[0]}"
