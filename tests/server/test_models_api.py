"""/v1/models against a real server, and how a name becomes weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from http_calls import call
from live import LiveServer, launch

from arbor_core.config.settings import ModelsConfig
from arbor_core.jobs.events import add_checkpoint
from arbor_core.jobs.records import Job, JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.models.catalog import Models, add_model, ft_name, strip_provider
from arbor_core.storage.database import Store
from arbor_core.types import ApiError, CheckpointEvent, Weights


def weights(folder: Path, **config: Any) -> Path:
    """A folder that looks like a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with two folders of models, and one hub organization."""
    folder = tmp_path_factory.mktemp("models")
    weights(folder / "a" / "tiny")
    weights(folder / "a" / "org" / "nested")
    weights(folder / "b" / "tiny")
    weights(folder / "a" / "coded", auto_map={"AutoModel": "code.Model"})
    (weights(folder / "a" / "broken") / "config.json").write_bytes(b"{")
    (folder / "a" / "pickled").mkdir()
    (folder / "a" / "pickled" / "config.json").write_text("{}")
    (folder / "a" / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (folder / "secret").mkdir()
    weights(folder / "secret" / "m")
    dirs = f"models.dirs=['{folder / 'a'}','{folder / 'b'}']"
    live = launch(folder / "server", dirs, "models.allow=[acme/*,lab/exact]")
    yield live
    live.stop()


def trained(server: LiveServer, rows: list[dict[str, Any]], **fields: Any) -> Any:
    """A job that has succeeded."""
    job = server.client.fine_tuning.jobs.create(training_file=server.upload(rows), **{"model": "mock/tiny", **fields})
    done = server.wait(job.id)
    assert done.status == "succeeded", done.error
    return done


def test_the_list(models: LiveServer) -> None:
    listed = {model.id: model for model in models.client.models.list()}
    assert {"tiny", "org/nested", "lab/exact"} <= set(listed)
    assert "pickled" not in listed
    assert listed["tiny"].object == "model"
    assert listed["tiny"].created > 0


@pytest.mark.parametrize("name", ["tiny", "org/nested", "lab/exact", "acme/anything-7B"])
def test_base_models(models: LiveServer, name: str) -> None:
    assert models.client.models.retrieve(name).id == name
    assert call(models.url, "GET", f"/v1/models/{name}").json["id"] == name, "slashes as they are"


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        pytest.param("nope", 404, "model_not_found", id="row-52"),
        pytest.param("other/hub-id", 404, "model_not_found", id="row-52-not-allowed"),
        pytest.param("pickled", 404, "model_not_found", id="row-52-no-safetensors"),
        pytest.param("%2e%2e/secret/m", 400, "invalid_model", id="row-53-traversal"),
        pytest.param("..%2fsecret", 400, "invalid_model", id="row-53-traversal-encoded"),
        pytest.param("%2fetc", 404, "model_not_found", id="row-53-absolute"),
        pytest.param("https:%2f%2fexample.com%2fm", 400, "invalid_model", id="row-53-url"),
        pytest.param("coded", 400, "invalid_model", id="row-53-remote-code"),
        pytest.param("broken", 400, "invalid_model", id="row-53-config"),
        pytest.param("%00", 404, "model_not_found", id="row-45-nul"),
        pytest.param("%F0%9F%8C%B3", 404, "model_not_found", id="row-45-emoji"),
        pytest.param("x" * 10_000, 404, "model_not_found", id="row-45-long"),
        pytest.param("ft:tiny:arbor::00000000", 404, "model_not_found", id="row-117-ft"),
        pytest.param("ft:tiny:arbor::00000000:ckpt-step-3", 404, "model_not_found", id="row-117-checkpoint"),
    ],
)
def test_names_that_are_no_models(models: LiveServer, name: str, status: int, code: str) -> None:
    for method in ("GET", "DELETE"):
        call(models.url, method, f"/v1/models/{name}").error(status, code, "model")


def test_a_base_model_cannot_be_deleted(models: LiveServer) -> None:
    for name in ("tiny", "acme/x"):
        call(models.url, "DELETE", f"/v1/models/{name}").error(403, "model_not_deletable", "model")
    assert models.client.models.retrieve("tiny").id == "tiny"


def test_a_fine_tuned_model(server: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    job = trained(server, chat_rows, suffix="own")
    name = job.fine_tuned_model
    client = server.client
    assert client.models.retrieve(name).id == name
    assert call(server.url, "GET", f"/v1/models/{quote(name, safe=':')}").json["owned_by"] == "arbor"
    assert [model.id for model in client.models.list() if model.id == name] == [name]
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    assert client.models.retrieve(checkpoint).id == checkpoint
    call(server.url, "DELETE", f"/v1/models/{checkpoint}").error(403, "model_not_deletable", "model")
    deleted = client.models.delete(name)
    assert (deleted.id, deleted.object, deleted.deleted) == (name, "model", True)
    for method in ("GET", "DELETE"):
        call(server.url, method, f"/v1/models/{name}").error(404, "model_not_found", "model")
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == name, "the job stays"


def test_an_adapter_cannot_be_trained_further(server: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    name = trained(server, chat_rows).fine_tuned_model
    body = {"model": name, "training_file": server.upload(chat_rows)}
    error = call(server.url, "POST", "/v1/fine_tuning/jobs", body).error(400, "unsupported_model", "model")
    assert "'mock/tiny'" in error["message"]


@pytest.mark.parametrize("name", ["openai/tiny", "arbor:tiny", "local:tiny", "huggingface/tiny", "tiny"])
def test_prefixes_of_other_clients(name: str) -> None:
    assert strip_provider(name) == "tiny"


def test_names_of_fine_tuned_models() -> None:
    first = ft_name("org/base", "arbor", "x", "ftjob-0123456789abcdef")
    assert first == "ft:org/base:arbor:x:89abcdef"
    assert ft_name("base", "arbor", None, "ftjob-0123456789abcdef") == "ft:base:arbor::89abcdef"
    again = ft_name(first, "arbor", "y", "ftjob-fedcba9876543210")
    assert again == "ft:org/base:arbor:y:76543210", "the base is the one that all began with"


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Models]:
    """The models of an empty storage directory, without a server."""
    store = Store(tmp_path / "arbor.db")
    yield Models(store, ModelsConfig(dirs=[tmp_path / "models"], allow=[]), tmp_path)
    store.close()


async def new_job(known: Models, path: str) -> Job:
    spec = JobSpec(trainer="t", method="supervised", config={}, model="base", model_path=path, seed=1)
    return await Jobs(known.store).create(NewJob("me", "file-1", None, None, {}, spec))


async def test_results_of_jobs(known: Models, tmp_path: Path) -> None:
    await made(known, "ft:base:arbor::adapter0", "/jobs/a", "adapter")
    await made(known, "ft:base:arbor::full0000", "/jobs/f", "full")
    adapter = known.resolve("ft:base:arbor::adapter0", "me")
    assert (adapter.base, adapter.base_path) == ("base", "/base")
    assert adapter.adapter == Weights("ft:base:arbor::adapter0", "/jobs/a")
    full = known.resolve("ft:base:arbor::full0000", "me")
    assert (full.base, full.base_path, full.adapter) == (full.name, "/jobs/f", None)
    assert known.trainable("ft:base:arbor::full0000", "me").path == "/jobs/f"
    with pytest.raises(ApiError, match="use its base, 'base'"):
        known.trainable("ft:base:arbor::adapter0", "me")
    await made(known, "ft:base:arbor::full0000", "/elsewhere", "full")
    assert known.trainable("ft:base:arbor::full0000", "me").path == "/jobs/f", "noted once, whoever says it again"
    with pytest.raises(ApiError, match="does not exist"):
        known.resolve("ft:base:arbor::full0000", "somebody else")


async def made(known: Models, name: str, path: str, kind: Any) -> None:
    fields = {"name": name, "owner": "me", "job_id": "ftjob-1", "base": "base", "base_path": "/base"}
    await known.store.write(lambda db: add_model(db, **fields, path=path, kind=kind))


@pytest.mark.parametrize("kind", ["adapter", "full"])
async def test_checkpoints_are_models(known: Models, tmp_path: Path, kind: str) -> None:
    job = await new_job(known, "/base")
    folder = tmp_path / "jobs" / job.id / "checkpoints" / "4-1"
    folder.mkdir(parents=True)
    if kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    name = f"{ft_name('base', 'arbor', None, job.id)}:ckpt-step-4"
    event = CheckpointEvent(step=4, dir="4-1")
    await known.store.write(lambda db: add_checkpoint(db, job.id, event, name))
    resolved = known.resolve(name, "me")
    if kind == "adapter":
        assert (resolved.base_path, resolved.adapter) == ("/base", Weights(name, str(folder)))
    else:
        assert (resolved.base_path, resolved.adapter) == (str(folder), None)
    folder.rename(folder.with_name("gone"))
    with pytest.raises(ApiError, match="does not exist"):
        known.resolve(name, "me")


@pytest.mark.parametrize("status", [pytest.param("queued", id="row-116"), pytest.param("failed", id="row-116-ended")])
async def test_deleting_a_model_that_is_trained_further(known: Models, status: Any) -> None:
    await made(known, "ft:base:arbor::full0000", "/jobs/f", "full")
    job = await new_job(known, "/jobs/f")
    await Jobs(known.store).transition(job, status)
    if status == "queued":
        with pytest.raises(ApiError, match=job.id):
            await known.delete("ft:base:arbor::full0000", "me")
        assert known.get("ft:base:arbor::full0000", "me")
    else:
        await known.delete("ft:base:arbor::full0000", "me")
        with pytest.raises(ApiError, match="does not exist"):
            known.get("ft:base:arbor::full0000", "me")


def test_objects_of_other_owners(start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]) -> None:
    server = start_server("auth.keys=[one,two]")
    one, two = server.new_client("one"), server.new_client("two")
    server.clients[:] = [one, two]
    job = trained(server, chat_rows)
    checkpoint = one.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert one.models.retrieve(job.fine_tuned_model)
    assert two.models.list().data == []
    assert two.files.list().data == []
    assert two.fine_tuning.jobs.list().data == []
    key = {"authorization": "Bearer two"}
    for path, code, param in [
        (f"/v1/models/{job.fine_tuned_model}", "model_not_found", "model"),
        (f"/v1/models/{checkpoint.fine_tuned_model_checkpoint}", "model_not_found", "model"),
        (f"/v1/files/{job.training_file}", "file_not_found", "id"),
        (f"/v1/files/{job.training_file}/content", "file_not_found", "id"),
        (f"/v1/fine_tuning/jobs/{job.id}", "fine_tune_not_found", "fine_tune_id"),
        (f"/v1/fine_tuning/jobs/{job.id}/events", "fine_tune_not_found", "fine_tune_id"),
    ]:
        call(server.url, "GET", path, headers=key).error(404, code, param)
    body = {"model": "mock/tiny", "training_file": job.training_file}
    call(server.url, "POST", "/v1/fine_tuning/jobs", body, key).error(400, "file_not_found", "training_file")
    body = {"model": job.fine_tuned_model, "training_file": "file-x"}
    call(server.url, "POST", "/v1/fine_tuning/jobs", body, key).error(404, "model_not_found", "model")
