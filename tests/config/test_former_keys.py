"""Keys of configurations that have another name now: clients, YAML and stored jobs with the former one keep working."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arbor_mock import MockGrpoConfig
from http_calls import JOBS, call, events
from live import LiveServer

from arbor_core.config.convert import renamed
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.rollouts.session import OpenSessions
from arbor_core.storage.database import Store
from arbor_core.testing import JobDirectory
from arbor_core.types import ConfigError, RolloutConfig
from arbor_core.worker.run import WorkerRun, open_run

SCHEMA = "/v1/arbor/trainers/mock_grpo/schema"


def warned(server: LiveServer, job: str) -> list[str]:
    return [event.message for event in events(server, job) if event.level == "warn"]


def body(**hyperparameters: Any) -> dict[str, Any]:
    return {"model": "mock/tiny", "method": {"type": "grpo", "grpo": {"hyperparameters": hyperparameters}}}


def test_a_request_with_the_former_name_is_taken_with_one_warning(server: LiveServer) -> None:
    answer = call(server.url, "POST", JOBS, body(too_stale=3))
    assert answer.status == 200, answer.body
    assert answer.json["hyperparameters"] == {"max_group_age": 3}
    (message,) = warned(server, answer.json["id"])
    assert "'too_stale' is called 'max_group_age' now" in message
    same = call(server.url, "POST", JOBS, body(max_group_age=3))
    assert warned(server, same.json["id"]) == []
    for job in (answer, same):
        call(server.url, "POST", f"{JOBS}/{job.json['id']}/cancel")


def test_two_names_with_different_values_are_refused(server: LiveServer) -> None:
    answer = call(server.url, "POST", JOBS, body(too_stale=3, max_group_age=4))
    answer.error(400, "conflicting_parameters", "method.grpo.hyperparameters.too_stale")


@pytest.mark.parametrize(
    "overrides",
    [["trainers.mock_grpo.too_stale=5"], ["+trainer=mock_grpo", "trainer.too_stale=5"]],
    ids=["of_a_trainer", "of_the_default_trainer"],
)
def test_an_operator_may_still_use_the_former_name(
    start_server: Callable[..., LiveServer], overrides: list[str]
) -> None:
    server = start_server(*overrides)
    found = call(server.url, "GET", SCHEMA).json["properties"]["max_group_age"]["default"]
    assert found == 5
    job = call(server.url, "POST", JOBS, body()).json["id"]
    assert warned(server, job) == [], "its author cannot mend it"
    call(server.url, "POST", f"{JOBS}/{job}/cancel")
    assert server.log.count("'too_stale' is called 'max_group_age' now") == 1


def test_an_attempt_of_a_job_that_was_stored_with_the_former_name(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path / "job", "mock_grpo", [], "mock/tiny", {"max_group_age": 7})
    path = job.dir / "job.json"
    path.write_text(path.read_text().replace('"max_group_age"', '"too_stale"'))
    assert "too_stale" in json.loads(path.read_text())["config"]
    run: WorkerRun[MockGrpoConfig] = open_run(job.prepare(), WorkerRun)
    assert run.config.max_group_age == 7


async def test_the_rollouts_of_a_job_that_was_stored_with_the_former_name(tmp_path: Path) -> None:
    config = {
        "num_generations": 2,
        "groups_per_step": 1,
        "max_staleness": 1,
        "too_stale": 7,
        "temperature": 1.0,
        "offer_seconds": 600,
    }
    store = Store(tmp_path / "arbor.db")
    spec = JobSpec("mock_grpo", "grpo", config, model="m", model_path="m", seed=1, input="rollouts")
    job = await Jobs(store).create(NewJob("me", "", None, None, {}, spec))
    sessions = OpenSessions(store, tmp_path)
    session = await sessions.of(job)
    assert session is not None
    assert session.config.max_group_age == 7
    sessions.close()
    store.close()


def test_present_names_are_left_alone() -> None:
    values = {"max_group_age": 1, "other": 2}
    assert renamed(values, RolloutConfig) == (values, [])
    assert renamed({"too_stale": None, "max_group_age": 1}, RolloutConfig)[0] == {"max_group_age": 1}
    assert renamed({"max_group_age": None, "too_stale": 1}, RolloutConfig)[0] == {"max_group_age": 1}
    with pytest.raises(ConfigError, match="former name"):
        renamed({"max_group_age": 2, "too_stale": 1}, RolloutConfig)
