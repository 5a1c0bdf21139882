"""What clients send to begin with: what becomes of each key, and what is said of those that are not used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from arbor_grpo.initialize import METHOD, translated
from grpo_http import MODEL, created, launch, stop
from live import LiveServer

DEFAULTS = {"max_staleness": 1, "too_stale": None, "max_length": None, "lora": {}, "temperature": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = launch(tmp_path_factory.mktemp("initialize"))
    yield live
    stop(live)


def hyperparameters(**config: Any) -> dict[str, Any]:
    asked = translated({"model": MODEL, "trainer_config": config}, DEFAULTS)
    return dict(asked.request["method"][METHOD]["hyperparameters"])


@pytest.mark.parametrize(
    ("said", "too_stale"),
    [
        ({}, 64),
        ({"max_staleness": None}, 64),
        ({"max_staleness": 0}, None),
        ({"max_staleness": 3}, None),
        ({"max_staleness": 0, "too_stale": 2}, 2),
        ({"too_stale": 0}, 0),
    ],
)
def test_old_groups_are_for_clients_that_say_nothing_of_them(said: dict[str, Any], too_stale: int | None) -> None:
    assert hyperparameters(**said).get("too_stale") == too_stale


def test_row_87_strictly_on_policy_means_that_no_older_group_is_trained_on(server: LiveServer) -> None:
    job = created(server, max_staleness=0)
    sampled = [job.sample(f"red green {number}", n=2)["id"] for number in range(2)]
    for number, name in enumerate(sampled):
        rewards = [{"completion_id": name, "index": index, "reward": index} for index in range(2)]
        assert job.ok("rewards", rewards=rewards)["accepted"]
        job.handled(number + 1)
    job.step()
    job.handled(3)
    steps = [event["data"] for event in job.events() if event["type"] == "metrics"]
    assert [step["staleness"] for step in steps] == [0, 0]
    assert len(steps[1]["fed"]["skipped"]) == 1
    job.post("cancel")
