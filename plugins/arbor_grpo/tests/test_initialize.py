"""What clients send to begin with: what becomes of each key, and what is said of those that are not used."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from arbor_grpo.api import initialize
from arbor_grpo.api.initialize import METHOD, translate
from grpo_http import GRPO, MODEL, call, created
from live import LiveServer

DEFAULTS = {"max_staleness": 1, "max_group_age": None, "max_length": None, "lora": {}, "temperature": 1.0}


def hyperparameters(**config: Any) -> dict[str, Any]:
    asked = translate({"model": MODEL, "trainer_config": config}, DEFAULTS)
    return dict(asked.request["method"][METHOD]["hyperparameters"])


@pytest.mark.parametrize(
    ("said", "age"),
    [
        ({}, 64),
        ({"max_staleness": None}, 64),
        ({"max_staleness": 0}, None),
        ({"max_staleness": 3}, None),
        ({"max_staleness": 0, "max_group_age": 2}, 2),
        ({"max_group_age": 0}, 0),
        ({"max_staleness": 0, "too_stale": 2}, 2),
        ({"too_stale": 0}, 0),
    ],
)
def test_old_groups_are_for_clients_that_say_nothing_of_them(said: dict[str, Any], age: int | None) -> None:
    assert hyperparameters(**said).get("max_group_age") == age


def test_a_job_of_a_client_with_the_former_name_has_one_warning(server: LiveServer) -> None:
    job = created(server, too_stale=3)
    (warning,) = (event["message"] for event in job.events() if event["level"] == "warn")
    assert "max_group_age" in warning
    job.post("cancel")


def test_the_former_name_of_a_key_is_read_with_one_warning() -> None:
    found = translate({"model": MODEL, "trainer_config": {"too_stale": 3, "max_staleness": 1}}, DEFAULTS)
    assert found.request["method"][METHOD]["hyperparameters"] == {"max_group_age": 3, "max_staleness": 1}
    (warning,) = found.warnings
    assert "'trainer_config.too_stale' is called 'max_group_age' now" in warning


def test_keys_that_mean_the_same() -> None:
    config = {"max_seq_len": 100, "max_length": 200, "max_context_length": 100}
    body = {"model": MODEL, "trainer_config": config, "inference_config": {"max_seq_len": 300}}
    asked = translate(body, DEFAULTS)
    assert asked.request["method"][METHOD]["hyperparameters"]["max_length"] == 100
    unused = ("trainer_config.max_length", "inference_config.max_seq_len")
    assert asked.warnings == [
        f"'trainer_config.max_seq_len' was used, and '{path}', which means the same, was not." for path in unused
    ]


def test_the_example_trains_all_weights() -> None:
    tree = ast.parse((Path(__file__).parents[3] / "examples" / "grpo.py").read_text())
    said: dict[str, Any] = {"steps": 1}
    exec(next(line for line in map(ast.unparse, tree.body) if line.startswith("CONFIG")), said)
    assert hyperparameters(**said["CONFIG"])["lora"] is None


def test_of_many_unknown_keys_some_are_named() -> None:
    keys = {f"max_lengt{number:04}": 1 for number in range(1000)}
    (said,) = translate({"model": MODEL, "trainer_config": {**keys, "k" * 100_000: 1}}, DEFAULTS).warnings
    assert said.startswith(
        "These keys are not known here and were not used: 'max_lengt0000' (did you mean 'max_length'?)"
    )
    assert said.endswith("'max_lengt0019' (did you mean 'max_length'?) and 981 more.")


def test_the_nearest_key_is_looked_for_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(initialize, "get_close_matches", lambda key, *_, **__: looked.append(key))
    translate({"model": MODEL, **{f"{number}-{'k' * 1000}": 1 for number in range(1000)}}, DEFAULTS)
    assert len(looked) == 20
    assert max(map(len, looked)) == 80


@pytest.mark.parametrize("where", ["trainer_config", None])
def test_a_configuration_with_more_than_1024_keys_is_refused(server: LiveServer, where: str | None) -> None:
    keys = {f"learning_rat{number}x": 1 for number in range(1025)}
    body = {"model": MODEL, where: keys} if where else {"model": MODEL, **keys}
    call(server.url, "POST", f"{GRPO}/initialize", body).error(400, "invalid_value")


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
