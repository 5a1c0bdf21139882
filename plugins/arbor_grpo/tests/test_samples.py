"""What people can read of the rollouts that a job was trained on or has skipped."""

from __future__ import annotations

from typing import Any

import pytest
from arbor_sft.tiny import tokenizer
from grpo_http import Job as LiveJob
from grpo_http import call, created, item
from grpo_jobs import QUICK, group, groups, rollout
from live import LiveServer

from arbor_core.jobdir.samples import newest_first
from arbor_core.types import Group, Rollout


def page(job: LiveJob, **query: Any) -> dict[str, Any]:
    text = "&".join(f"{name}={value}" for name, value in query.items())
    answer = call(job.server.url, "GET", f"/v1/arbor/jobs/{job.id}/samples?{text}")
    assert answer.status == 200, answer.body
    return dict(answer.json)


@pytest.fixture(scope="module")
def taught(server: LiveServer) -> LiveJob:
    """A job that has ended: it learned from three groups, and skipped one that was too old."""
    job = created(server, max_group_age=0, max_staleness=0)
    sampled = job.sample("one two three", n=2, max_tokens=9)
    rewards = [{"completion_id": sampled["id"], "index": index, "reward": float(index)} for index in range(2)]
    job.ok("rewards", rewards=rewards, group="first")
    job.handled(1)
    job.step([item(0.25, "no"), item(0.75, "yes")])
    job.handled(2)
    old = job.sample("too late", n=2)
    job.step()
    job.handled(3)
    rewards = [{"completion_id": old["id"], "index": index, "reward": 5.0} for index in range(2)]
    job.ok("rewards", rewards=rewards)
    job.handled(4)
    job.ok("terminate")
    job.until("succeeded")
    return job


def test_each_rollout_is_shown_with_what_became_of_it(taught: LiveJob) -> None:
    found = page(taught)
    assert (found["object"], found["has_more"]) == ("list", False)
    shown = found["data"]
    assert [one["step"] for one in shown] == [None, None, 3, 3, 2, 2, 1, 1]
    assert [one["reward"] for one in shown] == [5.0, 5.0, 0.0, 1.0, 0.25, 0.75, 0.0, 1.0]
    assert [one["advantage"] for one in shown[4:]] == [-0.25, 0.25, -0.5, 0.5]
    assert [bool(one["error"]) for one in shown] == [True, True, *[False] * 6]
    assert "batches old" in shown[0]["error"]
    by_text, by_id = shown[5], shown[7]
    assert by_text["prompt"] == [{"role": "user", "content": "say"}]
    assert by_text["completion"] == "yes"
    assert "one two three" in by_id["prompt"]
    assert set(by_id["completion"].split()) <= {"one", "two", "three", "user:"} or by_id["truncated"]
    assert (by_id["group"], by_id["group_size"], by_id["policy_version"], by_id["batch_id"]) == ("first", 2, 0, 0)
    assert by_id["completion_tokens"] == 9
    assert by_id["completion_ids"][0].startswith("chatcmpl-")
    assert {one["job_id"] for one in shown} == {taught.id}


def test_pages_and_filters(taught: LiveJob) -> None:
    whole = [one["id"] for one in page(taught)["data"]]
    assert len(set(whole)) == 8
    seen: list[str] = []
    more: dict[str, Any] = {}
    while True:
        found = page(taught, limit=3, **more)
        seen += [one["id"] for one in found["data"]]
        assert found["last_id"] == seen[-1]
        if not found["has_more"]:
            break
        more = {"after": found["last_id"]}
    assert seen == whole
    assert [one["reward"] for one in page(taught, step=2)["data"]] == [0.25, 0.75]
    assert [one["reward"] for one in page(taught, min_reward=0.75)["data"]] == [5.0, 5.0, 1.0, 0.75, 1.0]
    assert [one["reward"] for one in page(taught, min_reward=0.5, max_reward=0.8)["data"]] == [0.75]
    assert page(taught, step=99)["data"] == []
    assert page(taught, limit=2, max_reward=0.3, step=1) == page(taught, step=1, max_reward=0)


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("after=sample-0-1-0", "after", "invalid_cursor"),
        ("after=sample-0-0-2", "after", "invalid_cursor"),
        ("after=../../x", "after", "invalid_cursor"),
        ("limit=101", "limit", "integer_above_max_value"),
        ("step=0", "step", "invalid_value"),
        ("min_reward=much", "min_reward", "invalid_value"),
    ],
)
def test_what_is_refused(taught: LiveJob, query: str, param: str, code: str) -> None:
    path = f"/v1/arbor/jobs/{taught.id}/samples?{query}"
    call(taught.server.url, "GET", path).error(400, code, param)


def test_a_job_that_has_trained_on_nothing_has_none(live_job: LiveJob) -> None:
    assert page(live_job) == {"data": [], "first_id": None, "last_id": None, "has_more": False, "object": "list"}
    path = "/v1/arbor/jobs/ftjob-none/samples"
    call(live_job.server.url, "GET", path).error(404, "fine_tune_not_found", "fine_tune_id")


def test_the_real_trainer_tells_of_all_groups(job) -> None:
    """Trained on, rejected and too old ones, tokens and messages; the advantages are those of the loss."""
    done = job(max_steps=2, **QUICK | {"max_staleness": 0, "publish_steps": 1, "groups_per_step": 1})
    chat = [{"role": "user", "content": "say a"}]
    said = tuple(
        Rollout(trajectory=n, reward=float(n), messages=chat, answer={"role": "assistant", "content": "a" * n})
        for n in range(1, 3)
    )
    senseless = Group(id=7, rollouts=(rollout(0, [1, 2], [100_000], 1.0), rollout(1, [1], [-1], 0.0)), version=0)
    done.send(senseless, groups(1)[0], group(8), Group(id=9, rollouts=said, version=1, label="words"))
    done.must()
    found = [(place.rollout, one) for place, one in newest_first(done.files.samples)]
    assert [one.id for index, one in found if index == 0] == [9, 8, 0, 7]
    words, stale, tokens, rejected = (one for index, one in found if index == 0)
    assert (words.step, words.label, tokens.step) == (2, "words", 1)
    assert words.prompts == (chat,)
    assert [one.completion for one in words.rollouts] == ["a", "aa"]
    assert [round(one.advantage or 0, 2) for one in words.rollouts] == [-0.71, 0.71]
    assert all(one.prompt_tokens and one.completion_tokens for one in words.rollouts)
    assert (stale.step, rejected.step) == (0, 0)
    assert "max_group_age" in str(stale.error)
    assert "token 100000 (no token of its tokenizer)" in str(rejected.error)
    assert rejected.rollouts[1].completion == "-1"
    sent = groups(1)[0].rollouts
    decoded = [tokenizer(256).decode(list(one.completion[::4])) for one in sent]  # ids below 256
    assert [one.completion for one in tokens.rollouts] == decoded
    assert [one.reward for one in tokens.rollouts] == [one.reward for one in sent]
    rewards = [one.reward or 0.0 for one in sent]
    ordered = sorted(range(len(sent)), key=lambda n: rewards[n])
    assert sorted(range(len(sent)), key=lambda n: tokens.rollouts[n].advantage or 0) == ordered
    assert sum(one.advantage or 0 for one in tokens.rollouts) == pytest.approx(0, abs=1e-4)


def test_several_steps_on_a_batch_are_told_of_once(job) -> None:
    done = job(max_steps=4, **QUICK | {"num_iterations": 2})
    done.send(*groups(4))
    done.must()
    steps = {one.id: one.step for _, one in newest_first(done.files.samples)}
    assert steps == {0: 1, 1: 1, 2: 3, 3: 3}
