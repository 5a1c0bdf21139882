"""What a job must not be asked for, against a real server. The ids `row-N` are rows of the table of bad inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_calls import BASE, JOBS, call, events, submit, supervised
from live import LiveServer

from arbor_core.models import memory


@pytest.fixture
def file(server: LiveServer, chat_rows: list[dict[str, Any]]) -> str:
    return server.upload(chat_rows)


BAD_FIELDS = [
    pytest.param({"model": None}, 400, "invalid_type", "model", id="row-42-null"),
    pytest.param({"model": 7}, 400, "invalid_type", "model", id="row-42-number"),
    pytest.param({"training_file": ["a"]}, 400, "invalid_type", "training_file", id="row-42-array"),
    pytest.param({"seed": True}, 400, "invalid_type", "seed", id="row-42-bool-for-int"),
    pytest.param({"seed": "5"}, 400, "invalid_type", "seed", id="row-42-text-for-int"),
    pytest.param({"seed": 5.0}, 400, "invalid_type", "seed", id="row-42-float-for-int"),
    pytest.param({"seed": -1}, 400, "integer_below_min_value", "seed", id="seed-below"),
    pytest.param({"seed": 1 << 31}, 400, "integer_above_max_value", "seed", id="seed-above"),
    pytest.param({"sufix": "x"}, 400, "unknown_parameter", "sufix", id="row-43"),
    pytest.param({"metadata": {f"k{n}": "v" for n in range(17)}}, 400, "invalid_value", "metadata", id="row-49-pairs"),
    pytest.param({"metadata": {"k" * 65: "v"}}, 400, "invalid_value", "metadata", id="row-49-key"),
    pytest.param({"metadata": {"k": "v" * 513}}, 400, "invalid_value", "metadata", id="row-49-value"),
    pytest.param({"metadata": {"k": 1}}, 400, "invalid_type", "metadata", id="row-49-number"),
    pytest.param({"suffix": ""}, 400, "invalid_suffix", "suffix", id="row-50-empty"),
    pytest.param({"suffix": "x" * 65}, 400, "invalid_suffix", "suffix", id="row-50-long"),
    pytest.param({"suffix": "a/b"}, 400, "invalid_suffix", "suffix", id="row-50-slash"),
    pytest.param({"suffix": "../x"}, 400, "invalid_suffix", "suffix", id="row-50-dots"),
    pytest.param({"suffix": "🌳"}, 400, "invalid_suffix", "suffix", id="row-50-emoji"),
    pytest.param({"suffix": "a\n"}, 400, "invalid_suffix", "suffix", id="row-50-newline"),
    pytest.param({"model": "nope"}, 404, "model_not_found", "model", id="row-52"),
    pytest.param({"model": "ft:mock/tiny:arbor::00000000"}, 404, "model_not_found", "model", id="row-52-ft"),
    pytest.param({"model": "../../etc"}, 400, "invalid_model", "model", id="row-53-traversal"),
    pytest.param({"model": "a/../b"}, 400, "invalid_model", "model", id="row-53-inside"),
    pytest.param({"model": "/etc/passwd"}, 400, "invalid_model", "model", id="row-53-absolute"),
    pytest.param({"model": "https://example.com/m"}, 400, "invalid_model", "model", id="row-53-url"),
    pytest.param({"model": "a\0b"}, 400, "invalid_model", "model", id="row-53-nul"),
    pytest.param({"model": ""}, 400, "invalid_model", "model", id="row-53-empty"),
    pytest.param({"training_file": "file-nope"}, 400, "file_not_found", "training_file", id="row-54-training"),
    pytest.param({"validation_file": "../x"}, 400, "file_not_found", "validation_file", id="row-54-validation"),
    pytest.param({"integrations": [{"type": "mlflow"}]}, 400, "invalid_value", "integrations[0].type", id="row-68"),
    pytest.param(
        {"integrations": [{"type": "wandb", "wandb": {}}]},
        400,
        "missing_required_parameter",
        "integrations[0].wandb.project",
        id="row-68-project",
    ),
    pytest.param({"num_gpus": 0}, 400, "integer_below_min_value", "num_gpus", id="row-70-none"),
    pytest.param({"num_gpus": 10_000}, 400, "invalid_gpu", "num_gpus", id="row-70-many"),
    pytest.param({"method": {}}, 400, "missing_required_parameter", "method.type", id="row-41-method"),
    pytest.param({"method": {"type": 3}}, 400, "invalid_type", "method.type", id="row-42-method"),
    pytest.param({"method": {"type": "supervized"}}, 400, "invalid_value", "method.type", id="method-unknown"),
    pytest.param({"method": {"type": "supervised", "dpo": {}}}, 400, "invalid_value", "method.dpo", id="row-59"),
    pytest.param(
        {"method": {"type": "supervised", "supervized": {}}},
        400,
        "unknown_parameter",
        "method.supervized",
        id="row-59-typo",
    ),
    pytest.param(
        {"method": {"type": "supervised", "supervised": {"hyperparameter": {}}}},
        400,
        "unknown_parameter",
        "method.supervised.hyperparameter",
        id="row-43-method",
    ),
    pytest.param(
        {"method": supervised(n_epochs=1), "hyperparameters": {"n_epochs": 2}},
        400,
        "conflicting_parameters",
        "hyperparameters",
        id="row-60",
    ),
]


@pytest.mark.parametrize(("fields", "status", "code", "param"), BAD_FIELDS)
def test_fields_that_are_refused(
    server: LiveServer, file: str, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    submit(server, file, **fields).error(status, code, param)


@pytest.mark.parametrize("missing", [pytest.param(name, id=f"row-41-{name}") for name in ("model", "training_file")])
def test_what_must_be_there(server: LiveServer, file: str, missing: str) -> None:
    body = {"model": BASE, "training_file": file}
    del body[missing]
    call(server.url, "POST", JOBS, body).error(400, "missing_required_parameter", missing)


def test_row_57_an_unknown_hyperparameter_names_the_nearest(server: LiveServer, file: str) -> None:
    path = "method.supervised.hyperparameters.learing_rate"
    error = submit(server, file, method=supervised(learing_rate=1)).error(400, "unknown_parameter", path)
    assert "Did you mean 'learning_rate'?" in error["message"]
    old = submit(server, file, hyperparameters={"learing_rate": 1})
    old.error(400, "unknown_parameter", "hyperparameters.learing_rate")


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        pytest.param("n_epochs", 0, "invalid_value", id="row-58-n_epochs-0"),
        pytest.param("n_epochs", 51, "integer_above_max_value", id="row-58-n_epochs-51"),
        pytest.param("n_epochs", 1.5, "invalid_type", id="row-58-n_epochs-1.5"),
        pytest.param("n_epochs", "lots", "invalid_value", id="row-58-n_epochs-lots"),
        pytest.param("n_epochs", True, "invalid_type", id="row-58-n_epochs-true"),
        pytest.param("batch_size", 0, "invalid_value", id="row-58-batch_size-0"),
        pytest.param("batch_size", 257, "integer_above_max_value", id="row-58-batch_size-257"),
        pytest.param("learning_rate_multiplier", 0, "invalid_value", id="row-58-lr-0"),
        pytest.param("learning_rate_multiplier", -1, "invalid_value", id="row-58-lr-negative"),
        pytest.param("n_epochs", "${oc.env:HOME}", "invalid_value", id="no-interpolation"),
    ],
)
def test_hyperparameters_out_of_bounds(server: LiveServer, file: str, name: str, value: Any, code: str) -> None:
    path = f"method.supervised.hyperparameters.{name}"
    submit(server, file, method=supervised(**{name: value})).error(400, code, path)


@pytest.mark.parametrize("number", [pytest.param(n, id=f"row-58-{n}") for n in ("1e400", "NaN", "Infinity", "-1e999")])
def test_numbers_that_json_cannot_hold(server: LiveServer, file: str, number: str) -> None:
    body = f'{{"model":"{BASE}","training_file":"{file}","hyperparameters":{{"n_epochs":{number}}}}}'.encode()
    call(server.url, "POST", JOBS, body).error(400, "invalid_json")


def test_row_16_a_file_for_something_else(server: LiveServer, file: str) -> None:
    other = server.upload(b"{}", purpose="user_data")
    submit(server, other).error(400, "invalid_file_purpose", "training_file")
    submit(server, file, validation_file=other).error(400, "invalid_file_purpose", "validation_file")


def test_row_55_validating_on_the_training_file(server: LiveServer, file: str) -> None:
    job = submit(server, file, validation_file=file).json
    assert any(event.level == "warn" and "validation file" in event.message for event in events(server, job["id"]))


def test_row_67_a_tracker_that_is_not_there(server: LiveServer, file: str) -> None:
    asked = [{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}]
    job = submit(server, file, integrations=asked).json
    assert job["integrations"] == asked
    assert any(event.level == "warn" and "integrations" in event.message for event in events(server, job["id"]))
    assert server.wait(job["id"]).status == "succeeded"


@pytest.mark.ml
def test_methods_without_their_plugin(start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]) -> None:
    server = start_server("plugins.disabled=[mock,sft]", "allocator=local", mock=False)
    file = server.upload(chat_rows)
    error = submit(server, file, method={"type": "dpo"}).error(400, "method_not_installed", "method.type")
    assert "pip install arbor-dpo" in error["message"]
    submit(server, file).error(400, "method_not_installed", "method.type")


def test_row_66_a_queue_that_is_full(start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]) -> None:
    server = start_server("limits.queued_jobs=0")
    answer = submit(server, server.upload(chat_rows))
    answer.error(429, "queue_full")
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(("gigabytes", "warned"), [(100, True), (10, False)])
def test_row_69_a_model_that_no_device_holds(
    start_server: Callable[..., LiveServer],
    tmp_path: Path,
    chat_rows: list[dict[str, Any]],
    gigabytes: int,
    warned: bool,
) -> None:
    """The mock's devices have 80 GiB; the weights are a file of holes."""
    model = tmp_path / "models" / "large"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(gigabytes * 10**9)
    server = start_server(f"models.dirs=[{tmp_path / 'models'}]", storage=tmp_path / "server")
    job = submit(server, server.upload(chat_rows), model="large").json["id"]
    assert server.wait(job).status == "succeeded"
    told = [event.message for event in events(server, job) if event.level == "warn"]
    assert [f"about {gigabytes}.0 GB" in message for message in told] == [True] * warned


@pytest.mark.parametrize(
    ("config", "device", "said"),
    [
        ({"lora": None}, 3_900, "weights, gradients and optimizer"),
        ({"lora": None}, 4_000, None),
        ({"lora": {"r": 8}}, 900, "The weights alone"),
        ({"lora": {"r": 8}}, 1_000, None),
        ({"lora": None}, 0, None),
    ],
)
def test_row_69_what_a_job_needs(tmp_path: Path, config: dict[str, Any], device: int, said: str | None) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(600))
    (tmp_path / "b.safetensors").write_bytes(bytes(400))
    found = memory.shortfall(tmp_path, config, device, trains_all=config["lora"] is None)
    assert (said in found) if said and found else (found is said)


def test_row_69_a_model_that_is_not_here_is_not_judged(tmp_path: Path) -> None:
    assert memory.shortfall(tmp_path / "nobody" / "nothing", {}, 1, trains_all=True) is None
