"""What the server sends, against OpenAI's published schemas; and our own document, against the server."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from http_calls import MULTIPART, Answer, call, form
from live import LiveServer

SCHEMAS = json.loads((Path(__file__).parents[1] / "fixtures" / "openai-schemas.json").read_text())["$defs"]
ALWAYS = {
    "OpenAIFile": {"id", "object", "bytes", "created_at", "filename", "purpose", "status"},
    "FineTuningJob": set(SCHEMAS["FineTuningJob"]["required"]) | {"metadata", "integrations", "method"},
    "FineTuningJobEvent": {"id", "object", "created_at", "level", "message", "type", "data"},
}
"""Keys that are there whatever their value."""


def conforms(value: Any, name: str) -> None:
    """Whether an object is what OpenAI's document says; `paused` is a status there only in prose."""
    schema = {"$ref": f"#/$defs/{name}", "$defs": SCHEMAS}
    jsonschema.Draft202012Validator(schema).validate(value)
    assert ALWAYS.get(name, set()) <= set(value)


@pytest.fixture(scope="module")
def job(server: LiveServer) -> dict[str, Any]:
    """A job that has succeeded."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(n)}]} for n in range(10)
    ]
    body = {
        "model": "mock/tiny",
        "training_file": server.upload(rows),
        "validation_file": server.upload(rows),
        "metadata": {"a": "b"},
        "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    }
    created = call(server.url, "POST", "/v1/fine_tuning/jobs", body).json
    conforms(created, "FineTuningJob")
    server.wait(created["id"])
    found: dict[str, Any] = call(server.url, "GET", f"/v1/fine_tuning/jobs/{created['id']}").json
    return found


def test_jobs(server: LiveServer, job: dict[str, Any]) -> None:
    conforms(job, "FineTuningJob")
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    for url, name in [
        ("/v1/fine_tuning/jobs", "ListPaginatedFineTuningJobsResponse"),
        (f"{path}/events", "ListFineTuningJobEventsResponse"),
        (f"{path}/checkpoints", "ListFineTuningJobCheckpointsResponse"),
    ]:
        listed = call(server.url, "GET", url).json
        for one in listed["data"]:
            if one.get("method", {}).get("type") == "grpo":  # another test's job; OpenAI's schema lacks the word
                del one["method"]
        conforms(listed, name)
        assert listed["data"]
    for event in call(server.url, "GET", f"{path}/events?limit=1000").json["data"]:
        conforms(event, "FineTuningJobEvent")
    failed = {"model": "mock/tiny", "training_file": server.upload(b"not json\n")}
    failed = call(server.url, "POST", "/v1/fine_tuning/jobs", failed).json
    assert server.wait(failed["id"]).status == "failed"
    conforms(call(server.url, "GET", f"/v1/fine_tuning/jobs/{failed['id']}").json, "FineTuningJob")


def test_files(server: LiveServer, job: dict[str, Any]) -> None:
    for file in (job["training_file"], *job["result_files"]):
        conforms(call(server.url, "GET", f"/v1/files/{file}").json, "OpenAIFile")
    conforms(call(server.url, "GET", "/v1/files").json, "ListFilesResponse")
    other = server.upload(b"{}")
    conforms(call(server.url, "DELETE", f"/v1/files/{other}").json, "DeleteFileResponse")


def test_uploads(server: LiveServer) -> None:
    body = {"bytes": 2, "filename": "a", "mime_type": "text/plain", "purpose": "fine-tune"}
    begun = call(server.url, "POST", "/v1/uploads", body).json
    conforms(begun, "Upload")
    path = f"/v1/uploads/{begun['id']}"
    part = call(server.url, "POST", f"{path}/parts", form(("data", b"{}", "a")), MULTIPART).json
    conforms(part, "UploadPart")
    done = call(server.url, "POST", f"{path}/complete", {"part_ids": [part["id"]]}).json
    conforms(done, "Upload")
    conforms(done["file"], "OpenAIFile")


def test_models(server: LiveServer, job: dict[str, Any]) -> None:
    conforms(call(server.url, "GET", "/v1/models").json, "ListModelsResponse")
    conforms(call(server.url, "GET", f"/v1/models/{job['fine_tuned_model']}").json, "Model")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/files/x"), ("GET", "/v1/nope"), ("PUT", "/v1/files"), ("POST", "/v1/files")]
)
def test_errors(server: LiveServer, method: str, path: str) -> None:
    conforms(call(server.url, method, path).json, "ErrorResponse")


CHAT = {"model": "mock/tiny", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4, "n": 2}
TEXT = {"model": "mock/tiny", "prompt": "one two three", "max_tokens": 4}


def chunks(answer: Answer) -> list[dict[str, Any]]:
    frames = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line.startswith("data: ")]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


def test_chat_completions(server: LiveServer, job: dict[str, Any]) -> None:
    for model in ("mock/tiny", job["fine_tuned_model"]):
        asked = {**CHAT, "model": model, "logprobs": True, "top_logprobs": 2}
        conforms(call(server.url, "POST", "/v1/chat/completions", asked).json, "CreateChatCompletionResponse")
    streamed = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    found = chunks(call(server.url, "POST", "/v1/chat/completions", streamed))
    for chunk in found:
        conforms(chunk, "CreateChatCompletionStreamResponse")
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["total_tokens"] > 0


def test_completions(server: LiveServer) -> None:
    for more in ({}, {"logprobs": 2}):
        conforms(call(server.url, "POST", "/v1/completions", {**TEXT, **more}).json, "CreateCompletionResponse")
    for chunk in chunks(call(server.url, "POST", "/v1/completions", {**TEXT, "stream": True})):
        for choice in chunk["choices"]:  # the document forgets that it is null until the last chunk
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        conforms(chunk, "CreateCompletionResponse")


# --- our own document ----------------------------------------------------------------------------------------------

OPERATIONS = {
    "createFile": "POST /v1/files",
    "listFiles": "GET /v1/files",
    "retrieveFile": "GET /v1/files/{file_id}",
    "deleteFile": "DELETE /v1/files/{file_id}",
    "downloadFile": "GET /v1/files/{file_id}/content",
    "createFineTuningJob": "POST /v1/fine_tuning/jobs",
    "listPaginatedFineTuningJobs": "GET /v1/fine_tuning/jobs",
    "retrieveFineTuningJob": "GET /v1/fine_tuning/jobs/{job_id}",
    "cancelFineTuningJob": "POST /v1/fine_tuning/jobs/{job_id}/cancel",
    "pauseFineTuningJob": "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "resumeFineTuningJob": "POST /v1/fine_tuning/jobs/{job_id}/resume",
    "listFineTuningEvents": "GET /v1/fine_tuning/jobs/{job_id}/events",
    "listFineTuningJobCheckpoints": "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
    "listModels": "GET /v1/models",
    "retrieveModel": "GET /v1/models/{model}",
    "deleteModel": "DELETE /v1/models/{model}",
    "createChatCompletion": "POST /v1/chat/completions",
    "createCompletion": "POST /v1/completions",
}
"""OpenAI's operation ids and where they are."""


@pytest.fixture(scope="module")
def document(server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = call(server.url, "GET", "/schema/openapi.json").json
    return found


def test_operations_are_called_as_openai_calls_them(document: dict[str, Any]) -> None:
    found = {
        operation["operationId"]: f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert OPERATIONS.items() <= found.items()
    assert document["info"]["title"] == "Arbor"


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references
    assert references <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_bodies_and_queries_are_described(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path, name in [("/v1/fine_tuning/jobs", "model"), ("/v1/chat/completions", "messages")]:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert name in schemas[body["$ref"].rpartition("/")[2]]["required"]
    form = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["required"]) == {"file", "purpose"}
    query = {p["name"]: p["schema"] for p in document["paths"]["/v1/files"]["get"]["parameters"]}
    assert query["limit"] == {"type": "integer", "minimum": 1, "maximum": 10000, "default": 10000}


def test_what_needs_a_key_says_so(document: dict[str, Any]) -> None:
    open_paths = {path for path, methods in document["paths"].items() if "security" not in next(iter(methods.values()))}
    assert open_paths == {"/health", "/ready", "/schema/openapi.json"}


def test_our_answers_are_what_our_document_says(server: LiveServer, document: dict[str, Any], job: Any) -> None:
    defs = {"components": document["components"]}
    for path, given in [
        ("/v1/files", "/v1/files"),
        ("/v1/models", "/v1/models"),
        ("/v1/fine_tuning/jobs/{job_id}", f"/v1/fine_tuning/jobs/{job['id']}"),
        ("/v1/fine_tuning/jobs/{job_id}/events", f"/v1/fine_tuning/jobs/{job['id']}/events"),
        ("/v1/arbor/plugins", "/v1/arbor/plugins"),
    ]:
        answer = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**answer, **defs}).validate(call(server.url, "GET", given).json)


def test_the_page_fetches_nothing_from_elsewhere(server: LiveServer) -> None:
    answer = call(server.url, "GET", "/docs")
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.body.decode()
    assert "/schema/openapi.json" in page
    assert not re.search(r"https?:|//\w|<link|<script\s+src|@import|innerHTML", page)


@cache
def plugins(url: str) -> dict[str, Any]:
    return {plugin["name"].partition(" ")[0]: plugin for plugin in call(url, "GET", "/v1/arbor/plugins").json["data"]}


def test_plugins_and_what_they_bring(server: LiveServer) -> None:
    found = plugins(server.url)
    assert "fifo" in found["arbor-core"]["brings"]["schedulers"]
    assert found["arbor-mock"]["brings"]["trainers"] == ["mock", "mock_grpo", "mock_commands"]
    assert found["arbor-mock"]["broken"] is None


def test_the_schema_of_a_trainer(server: LiveServer) -> None:
    schema = call(server.url, "GET", "/v1/arbor/trainers/mock/schema").json
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["n_epochs"]["default"] == "auto"
    assert schema["required"] == [], "every key has a default"
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"n_epochs": 3})
    assert not validator.is_valid({"n_epochs": 51})
    assert not validator.is_valid({"n_epoch": 3})
    call(server.url, "GET", "/v1/arbor/trainers/nope/schema").error(404, "trainer_not_found", "name")
