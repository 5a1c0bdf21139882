"""/v1/fine_tuning/jobs against a real server. The ids `row-N` are rows of the table of bad inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import openai
import pytest
from http_calls import BASE, JOBS, call, events, submit, supervised
from live import LiveServer

NO_JOB = ("fine_tune_not_found", "fine_tune_id")
SLOW = {"steps": 100_000, "step_seconds": 0.05}
"""Hyperparameters of a job that runs until it is cancelled."""


@pytest.fixture
def file(server: LiveServer, chat_rows: list[dict[str, Any]]) -> str:
    return server.upload(chat_rows)


@pytest.fixture
def hanging(server: LiveServer, file: str) -> Any:
    """A job that runs until it is cancelled."""
    job = submit(server, file, hyperparameters=SLOW).json
    server.wait(job["id"], "running")
    yield server.client.fine_tuning.jobs.retrieve(job["id"])
    call(server.url, "POST", f"{JOBS}/{job['id']}/cancel")
    server.wait(job["id"], "cancelled")


def test_a_job_from_upload_to_result(server: LiveServer, file: str) -> None:
    jobs = server.client.fine_tuning.jobs
    job = jobs.create(
        model=BASE,
        training_file=file,
        validation_file=server.upload([{"messages": [{"role": "assistant", "content": "x"}]}] * 10),
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )
    assert re.fullmatch(r"ftjob-[A-Za-z0-9]{24}", job.id)
    assert job.status == "validating_files"
    assert (job.seed, job.metadata, job.error, job.fine_tuned_model) == (7, {"team": "a"}, None, None)
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == "auto"
    assert job.hyperparameters.learning_rate_multiplier == "auto"
    done = server.wait(job.id)
    assert done.fine_tuned_model == f"ft:{BASE}:arbor:mine:{job.id[-8:]}"
    assert done.hyperparameters.n_epochs == 2
    assert isinstance(done.hyperparameters.batch_size, int), "auto is replaced by the number that was used"
    assert done.finished_at >= done.created_at
    assert done.trained_tokens > 0
    (result,) = done.result_files
    header = server.client.files.content(result).text.splitlines()[0]
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert server.client.files.retrieve(result).purpose == "fine-tune-results"
    metrics = [event for event in events(server, job.id) if event.type == "metrics"]
    assert metrics[0].data["step"] > metrics[-1].data["step"], "newest first"
    checkpoints = list(jobs.checkpoints.list(job.id, limit=1))
    assert [c.step_number for c in checkpoints] == sorted((c.step_number for c in checkpoints), reverse=True)
    assert checkpoints[0].fine_tuned_model_checkpoint.startswith(f"{done.fine_tuned_model}:ckpt-step-")
    assert checkpoints[0].metrics.step == checkpoints[0].step_number
    samples = call(server.url, "GET", f"/v1/arbor/jobs/{job.id}/samples").json
    assert (samples["data"], samples["has_more"]) == ([], False), "it learns from a file"


def test_the_old_style_of_hyperparameters(server: LiveServer, file: str) -> None:
    job = submit(server, file, hyperparameters={"n_epochs": 3}).json
    assert job["method"]["type"] == "supervised"
    assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 3
    assert submit(server, file, hyperparameters={"n_epochs": 3}, method=supervised(n_epochs=3)).status == 200
    assert submit(server, file, method={"type": "supervised", "supervised": None, "dpo": None}).status == 200


def test_every_nullable_field_is_there(server: LiveServer, file: str) -> None:
    job = submit(server, file).json
    for name in ("error", "fine_tuned_model", "finished_at", "trained_tokens", "validation_file", "metadata"):
        assert job[name] is None
    assert job["result_files"] == []
    assert job["seed"] in range(1 << 31)
    assert submit(server, file).json["seed"] != job["seed"]


def test_a_seed_and_keys_of_the_trainer_are_shown(server: LiveServer, file: str) -> None:
    job = submit(server, file, seed=0, method=supervised(learning_rate=0.5)).json
    assert job["seed"] == 0
    assert job["hyperparameters"]["learning_rate"] == 0.5


@pytest.mark.parametrize("method", ["supervised", "mock"])
def test_a_trainer_answers_to_its_methods_and_its_name(server: LiveServer, file: str, method: str) -> None:
    block = {"type": method, method: {"hyperparameters": {"n_epochs": 1}}}
    job = submit(server, file, method=block).json
    assert job["method"] == {"type": method, method: {"hyperparameters": job["hyperparameters"]}}


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        pytest.param("limit=0", "invalid_value", "limit", id="row-46-0"),
        pytest.param("limit=-1", "invalid_value", "limit", id="row-46-negative"),
        pytest.param("limit=1000000000", "integer_above_max_value", "limit", id="row-46-large"),
        pytest.param("limit=x", "invalid_value", "limit", id="row-46-text"),
        pytest.param("limit=1.5", "invalid_value", "limit", id="row-46-float"),
        pytest.param("after=nope", "invalid_cursor", "after", id="row-47"),
        pytest.param("after=%00", "invalid_cursor", "after", id="row-47-nul"),
    ],
)
def test_queries_that_are_refused(server: LiveServer, file: str, query: str, code: str, param: str) -> None:
    job = submit(server, file).json["id"]
    for path in (JOBS, f"{JOBS}/{job}/events", f"{JOBS}/{job}/checkpoints", "/v1/files"):
        call(server.url, "GET", f"{path}?{query}").error(400, code, param)


def test_a_cursor_of_another_list(server: LiveServer, file: str) -> None:
    first, second = (submit(server, file).json["id"] for _ in range(2))
    foreign = events(server, second)[0].id
    call(server.url, "GET", f"{JOBS}/{first}/events?after={foreign}").error(400, "invalid_cursor", "after")
    call(server.url, "GET", f"{JOBS}?after={file}").error(400, "invalid_cursor", "after")


def test_row_48_pages_while_jobs_are_added(server: LiveServer, file: str) -> None:
    mark = {"batch": file}
    old = [submit(server, file, metadata=mark).json["id"] for _ in range(4)]
    first = server.client.fine_tuning.jobs.list(limit=2, metadata=mark)
    submit(server, file, metadata=mark)
    rest = first.get_next_page()
    assert [job.id for job in first.data] + [job.id for job in rest.data] == old[::-1]
    assert first.has_more
    assert not rest.has_more


def test_jobs_by_metadata(server: LiveServer, file: str) -> None:
    jobs = server.client.fine_tuning.jobs
    with_key = submit(server, file, metadata={"a": file, "b": ""}).json["id"]
    without = submit(server, file).json["id"]
    assert [job.id for job in jobs.list(metadata={"a": file})] == [with_key]
    assert [job.id for job in jobs.list(metadata={"a": file, "b": ""})] == [with_key]
    assert [job.id for job in jobs.list(metadata={"a": file, "b": "x"})] == []
    null = [job["id"] for job in call(server.url, "GET", f"{JOBS}?metadata=null&limit=1000").json["data"]]
    assert without in null
    assert with_key not in null


@pytest.mark.parametrize(("pairs", "status"), [(16, 200), (17, 400), (1100, 400)])
def test_row_49_jobs_by_more_metadata_than_they_can_have(server: LiveServer, pairs: int, status: int) -> None:
    answer = call(server.url, "GET", f"{JOBS}?" + "&".join(f"metadata[k{n}]=v" for n in range(pairs)))
    assert answer.status == status, answer.body
    if status == 400:
        answer.error(400, "invalid_value", "metadata")


def test_row_45_ids_that_cannot_be(server: LiveServer) -> None:
    for name in ("%00", "..", "..%5c..%5cetc", "x" * 10_000, "%F0%9F%8C%B3", "ftjob-nope"):
        for tail in ("", "/events", "/checkpoints"):
            call(server.url, "GET", f"{JOBS}/{name}{tail}").error(404, *NO_JOB)
        for verb in ("cancel", "pause", "resume"):
            call(server.url, "POST", f"{JOBS}/{name}/{verb}").error(404, *NO_JOB)
        for tail in ("", "/content"):
            call(server.url, "GET", f"/v1/files/{name}{tail}").error(404, "file_not_found", "id")
    assert call(server.url, "GET", f"{JOBS}/..%2f..%2fetc").status == 404


def test_row_97_row_98_cancelling(server: LiveServer, hanging: Any) -> None:
    jobs = server.client.fine_tuning.jobs
    assert jobs.cancel(hanging.id).status in ("running", "cancelled")
    server.wait(hanging.id, "cancelled")
    seen = events(server, hanging.id)
    again = jobs.cancel(hanging.id)
    assert again.status == "cancelled"
    assert again == jobs.retrieve(hanging.id)
    assert events(server, hanging.id) == seen


def test_row_99_cancelling_what_has_ended(server: LiveServer, file: str) -> None:
    job = submit(server, file).json["id"]
    server.wait(job)
    for verb in ("cancel", "pause", "resume"):
        call(server.url, "POST", f"{JOBS}/{job}/{verb}").error(400, "invalid_job_state")
    with pytest.raises(openai.BadRequestError, match="it has succeeded"):
        server.client.fine_tuning.jobs.cancel(job)


def test_row_96_cancelling_before_it_begins(start_server: Callable[..., LiveServer], chat_rows: Any) -> None:
    server = start_server("gpu.train=[0]")
    file = server.upload(chat_rows)
    first = submit(server, file, hyperparameters=SLOW).json["id"]
    server.wait(first, "running")
    second = submit(server, file).json["id"]
    server.wait(second, "queued")
    assert call(server.url, "POST", f"{JOBS}/{second}/cancel").json["status"] == "cancelled"
    third = submit(server, file).json["id"]
    assert call(server.url, "POST", f"{JOBS}/{third}/cancel").json["status"] == "cancelled", "while it is validated"
    assert server.client.fine_tuning.jobs.retrieve(third).status == "cancelled"
    fourth = submit(server, file).json["id"]
    server.wait(fourth, "queued")
    paused = call(server.url, "POST", f"{JOBS}/{fourth}/pause").json
    assert paused["status"] == "paused"
    assert call(server.url, "POST", f"{JOBS}/{fourth}/pause").json["status"] == "paused"
    assert call(server.url, "POST", f"{JOBS}/{fourth}/resume").json["status"] == "queued"
    assert call(server.url, "POST", f"{JOBS}/{first}/resume").json["status"] == "running", "resuming changes nothing"
    server.client.fine_tuning.jobs.cancel(first)
    assert server.wait(fourth).status == "succeeded"


def test_the_body_of_cancel_may_be_empty_or_not(server: LiveServer, hanging: Any) -> None:
    answer = call(server.url, "POST", f"{JOBS}/{hanging.id}/cancel", b"", {"content-type": "application/json"})
    assert answer.status == 200
    assert json.loads(answer.body)["id"] == hanging.id
