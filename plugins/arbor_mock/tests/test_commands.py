"""The trainer that executes commands, in its worker process."""

from __future__ import annotations

import json
import signal

import pytest
from arbor_mock.train import STATE
from waiting import until

from arbor_core import CheckpointEvent, MessageEvent, MetricsEvent, PolicyPublished, ResultEvent
from arbor_core.jobdir import commands, results
from arbor_core.jobdir.inbox import Inbox


@pytest.fixture
def executing(job):
    """A job directory of the trainer mock_commands."""

    def make(**values):
        return job(trainer="mock_commands", **values)

    return make


def send(folder, *sent, first=1):
    box = Inbox(folder.dir / "inbox")
    for number, command in enumerate(sent, first):
        box.append([commands.entry(json.dumps(command).encode(), number)])
    box.close()


def answers(folder):
    there = folder.dir / "results"
    return {place.number: json.loads(results.payload(there, place)) for place in results.readable(there, 0)}


def add(number):
    return {"do": "add", "n": number}


def test_commands_are_executed_and_answered(executing):
    done = executing()
    send(done, add(5), {"do": "sum"}, {"do": "checkpoint"}, {"do": "publish"}, {"do": "what"}, add(2))
    done.desire("finish")
    assert done.run() == 0, (done.dir / "attempts/1/worker.log").read_text()
    found = answers(done)
    assert "error" in found.pop(5)
    assert found == {1: {"sum": 5}, 2: {"sum": 5}, 3: {"step": 2}, 4: {"version": 4}, 6: {"sum": 7}}
    assert [event.step for event in done.events(MetricsEvent)] == [1, 2]
    assert [event.step for event in done.events(CheckpointEvent)] == [2, 4, 6]
    assert [(event.version, event.handled) for event in done.events(PolicyPublished)] == [(4, 0)]
    assert done.events(ResultEvent)[0].step == 6


def test_a_killed_job_ends_where_one_that_was_not_does(executing):
    sent = [add(1), add(2), {"do": "checkpoint"}, add(3), add(4), {"do": "sum"}]
    killed, whole = (executing(fault=fault, fault_step=5) for fault in ("crash", "none"))
    for folder in (killed, whole):
        send(folder, *sent)
        folder.desire("finish")
    assert killed.run() == -signal.SIGKILL
    told = answers(killed)
    assert set(told) == {1, 2, 3, 4, 5}
    assert killed.run() == 0
    assert whole.run() == 0
    assert answers(killed) == answers(whole) == {**told, 6: {"sum": 10}}
    assert not [event for event in killed.events(MessageEvent) if event.level == "warn"]
    last = (killed.dir / "checkpoints" / "6-2", whole.dir / "checkpoints" / "6-1")
    state = [(folder / STATE).read_bytes() for folder in last]
    assert state[0] == state[1]
    assert json.loads(state[0])["digest"]


def test_another_result_than_before_is_not_told_but_reported(executing):
    """The first one stands; that the trainer has come to another one shows that it is not what it was."""
    again = executing(fault="crash", fault_step=2)
    send(again, add(1), add(2))
    again.desire("finish")
    assert again.run() == -signal.SIGKILL
    told = answers(again)
    path = next((again.dir / "inbox").glob("*.log"))
    path.unlink()
    send(again, add(1), add(3))
    assert again.run() == 0
    assert answers(again) == told == {1: {"sum": 1}, 2: {"sum": 3}}
    (warning,) = (event for event in again.events(MessageEvent) if event.level == "warn")
    assert warning.message.startswith("Command 2 was executed again with another result than before")


def test_it_waits_for_the_command_that_is_missing(executing):
    waiting = executing()
    send(waiting, add(2), first=2)
    process = waiting.start()
    send(waiting, add(1))
    until(lambda: answers(waiting) == {1: {"sum": 1}, 2: {"sum": 3}})
    waiting.desire("pause")
    assert process.wait(120) == 0
    assert [event.step for event in waiting.events(CheckpointEvent)] == [2]
    waiting.desire("finish")
    send(waiting, add(4), first=4)  # whoever asks to finish has given up on the third
    assert waiting.run() == 0
    assert set(answers(waiting)) == {1, 2}
