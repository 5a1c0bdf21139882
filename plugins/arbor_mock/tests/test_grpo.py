"""The trainer that learns from rollouts, in its worker process."""

from __future__ import annotations

import json
import signal

import pytest
from arbor_mock.grpo import Learned
from arbor_mock.train import STATE
from waiting import until

from arbor_core.jobdir.checkpoint_requests import ask
from arbor_core.jobdir.groups import entry
from arbor_core.jobdir.inbox import Inbox
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobdir.samples import newest_first
from arbor_core.types import (
    CheckpointEvent,
    CheckpointRequest,
    ErrorEvent,
    Group,
    GroupsSkipped,
    MetricsEvent,
    PolicyPublished,
    ResultEvent,
    Rollout,
)


@pytest.fixture
def grpo(job):
    """A job directory of the trainer mock_grpo, and a function that sends it groups of several policy versions."""

    def make(**values):
        return job(trainer="mock_grpo", **{"num_generations": 2, **values})

    return make


def send(folder, *versions, first=0, **metrics):
    inbox = Inbox(folder.dir / "inbox")
    for id, version in enumerate(versions, first):  # noqa: A001
        rollouts = tuple(
            Rollout(
                trajectory=number,
                reward=float(number),
                messages=[{"role": "user", "content": "say"}],
                answer={"role": "assistant", "content": f"{id} it is"},
            )
            for number in range(2)
        )
        inbox.append([entry(Group(id=id, rollouts=rollouts, version=version, metrics=metrics), id)])
    inbox.close()


def handled(job):
    """What the newest attempt said of how many groups it had handled, each time."""
    return [event.handled for event in job.events() if isinstance(event, PolicyPublished | GroupsSkipped)]


def test_steps_are_made_of_groups_in_order(grpo):
    done = grpo(max_steps=3, groups_per_step=2, max_group_age=9)
    send(done, 0, 0, 0, 0, 0, 0, 0, validation_score=0.5)
    assert done.run() == 0, (done.dir / "attempts/1/worker.log").read_text()
    metrics = [event.data for event in done.events(MetricsEvent)]
    assert [values["step"] for values in metrics] == [1, 2, 3]
    assert [len(values["fed"]["groups"]) for values in metrics] == [2, 2, 2]
    assert [values["staleness"] for values in metrics] == [0, 1, 2]
    assert metrics[0]["reward"] == metrics[0]["reward_std"] == metrics[0]["validation_score"] == 0.5
    assert len({values["digest"] for values in metrics}) == 3
    assert handled(done) == [2, 4, 6]
    result = done.events(ResultEvent)[0]
    assert (result.step, result.adapter, result.trained_tokens) == (3, True, 36)
    assert json.loads((done.dir / "checkpoints" / "3-1" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_what_is_too_old_is_skipped_and_counted(grpo):
    done = grpo(max_steps=2, max_staleness=0)
    send(done, 0, 0, 0, 1)
    assert done.run() == 0
    fed = [event.data["fed"] for event in done.events(MetricsEvent)]
    assert [len(one["skipped"]) for one in fed] == [0, 2]
    assert handled(done)[-1] == 4


def test_skipping_gives_credits_back_without_a_step(grpo):
    waiting = grpo(max_steps=2, max_staleness=0)
    send(waiting, 0, 0)
    process = waiting.start()
    until(lambda: len(handled(waiting)) == 2)
    assert handled(waiting)[-1] == 2
    waiting.desire("finish")
    assert process.wait(120) == 0
    assert waiting.events(ResultEvent)[0].step == 1


def test_a_checkpoint_is_named_while_no_group_comes(grpo):
    waiting = grpo()
    process = waiting.start()
    ask(JobDir(waiting.dir), CheckpointRequest("best", {"score": 1}))
    until(lambda: any(event.name for event in waiting.events(CheckpointEvent)))
    assert (waiting.dir / "checkpoints" / "named" / "best").resolve().name == "0-1"
    waiting.desire("finish")
    assert process.wait(120) == 0


def test_a_killed_job_learns_the_same_as_one_that_was_not(grpo):
    versions = (0, 0, 0, 1, 1, 2, 2, 3)
    killed, whole = (grpo(max_steps=4, fault=fault, fault_step=3, checkpoint_steps=2) for fault in ("crash", "none"))
    for folder in (killed, whole):
        send(folder, *versions)
    assert killed.run() == -signal.SIGKILL
    assert killed.run() == 0
    assert whole.run() == 0
    digests = {event.step: event.data["digest"] for event in whole.events(MetricsEvent)}
    assert {event.step: event.data["digest"] for event in killed.events(MetricsEvent, 1)}.items() <= digests.items()
    assert {event.step: event.data["digest"] for event in killed.events(MetricsEvent, 2)}.items() <= digests.items()
    states = [
        (folder.dir / "checkpoints" / name / STATE).read_bytes() for folder, name in ((killed, "4-2"), (whole, "4-1"))
    ]
    assert states[0] == states[1]
    assert Learned().digest not in digests.values()


@pytest.mark.parametrize("point", ["samples.written", "samples.written:3", "samples.written:5", "metrics.event:2"])
def test_a_killed_job_shows_the_same_samples_as_one_that_was_not(grpo, monkeypatch, point):
    """Each group once, also those that it was trained on twice, and those that were skipped."""
    versions = (0, 0, 0, 0, 1, 1, 2, 2, 3)
    killed, whole = (grpo(max_steps=4, checkpoint_steps=2, max_group_age=0, groups_per_step=1) for _ in range(2))
    for folder in (killed, whole):
        send(folder, *versions)
    with monkeypatch.context() as dying:
        dying.setenv("ARBOR_CRASH_AT", point)
        assert killed.run() == -signal.SIGKILL
    assert killed.run() == 0
    assert whole.run() == 0
    found, expected = ([(one.id, one.step, one.error) for one in shown(folder)] for folder in (killed, whole))
    assert found == expected
    assert [id for id, _, _ in expected] == list(range(8, -1, -1))  # noqa: A001
    assert {step for _, step, _ in expected} == {0, 1, 2, 3, 4}


def shown(folder):
    return [group for place, group in newest_first(JobDir(folder.dir).samples) if place.rollout == 0]


def test_a_paused_job_keeps_its_place(grpo):
    paused = grpo(step_seconds=0.05, max_group_age=64)
    send(paused, *[0] * 100)
    process = paused.start()
    until(lambda: len(paused.events(MetricsEvent)) > 2)
    paused.desire("pause")
    assert process.wait(120) == 0
    step = paused.events(MetricsEvent)[-1].step
    assert paused.events(CheckpointEvent)[-1].step == step
    paused.desire("finish")
    assert paused.run() == 0
    assert paused.events(ResultEvent)[0].step == step


def test_it_can_die_before_the_first_step(grpo):
    dead = grpo(fault="fail", fault_step=0)
    assert dead.run() == 1
    assert dead.events(ErrorEvent)[0].code == "mock_failure"
