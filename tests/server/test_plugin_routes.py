"""A plugin that brings routes: installed for real, on a server of its own, over HTTP."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_calls import call
from live import LiveServer, launch

MODULE = '''
from litestar import get, post
from litestar.response import Stream
from msgspec import Struct, json

from arbor_core import hookimpl


class Order(Struct):
    """What to train."""

    training_file: str
    n_epochs: int = 1


@hookimpl
def arbor_routes(services):
    @post("/v1/acme/train", operation_id="acmeTrain", status_code=200)
    async def train(data: Order, owner: str) -> dict:
        """Train, the acme way."""
        asked = {"n_epochs": data.n_epochs}
        return await services.create_job(
            {"model": "mock/tiny", "training_file": data.training_file, "hyperparameters": asked}, owner
        )

    @get("/v1/acme/follow/{job_id:str}")
    async def follow(job_id: str, owner: str) -> Stream:
        """Events, a line each."""
        await services.job(job_id, owner)

        async def lines():
            async for event in services.events(job_id, owner):
                yield json.encode(event) + b"\\n"

        return Stream(lines())

    @get("/v1/acme/fail")
    async def fail() -> None:
        raise RuntimeError("a secret of ours")

    return [train, follow, fail]
'''


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("acme")
    (folder / "acme.py").write_text(textwrap.dedent(MODULE))
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    (shown,) = [
        block for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "LongPoll(" in block
    ]
    (folder / "shown.py").write_text(shown)
    for name in ("acme", "shown"):
        metadata = folder / f"arbor_{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: arbor-{name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[arbor]\n{name} = {name}\n")
    live = launch(folder / "server", env={"PYTHONPATH": str(folder)})
    yield live
    live.stop()


def test_hook_arbor_routes_lets_a_plugin_create_and_follow_jobs(
    acme: LiveServer, chat_rows: list[dict[str, Any]]
) -> None:
    answer = call(acme.url, "POST", "/v1/acme/train", {"training_file": acme.upload(chat_rows), "n_epochs": 2})
    assert answer.status == 200, answer.body
    job = answer.json
    assert job["hyperparameters"]["n_epochs"] == 2
    lines = call(acme.url, "GET", f"/v1/acme/follow/{job['id']}").body.splitlines()  # ends with the job
    done = acme.client.fine_tuning.jobs.retrieve(job["id"])
    assert done.status == "succeeded"
    followed = [json.loads(line)["id"] for line in lines]
    listed = [event.id for event in acme.client.fine_tuning.jobs.list_events(job["id"], limit=1000)]
    assert followed == listed[::-1], "all of them, oldest first"


def test_the_route_of_the_documentation_waits_for_news(acme: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    job = call(acme.url, "POST", "/v1/acme/train", {"training_file": acme.upload(chat_rows)}).json
    known = [job["status"]]
    while known[-1] != "succeeded":
        answer = call(acme.url, "GET", f"/v1/acme/status/{job['id']}?known={known[-1]}")
        assert answer.status == 200, answer.body
        known.append(answer.json["status"])
        assert len(known) < 20, known
    assert len(set(known)) == len(known), "each answer was news"
    call(acme.url, "GET", "/v1/acme/status/ftjob-nope?known=running").error(404, "fine_tune_not_found", "fine_tune_id")


def test_services_answer_as_the_api_does(acme: LiveServer) -> None:
    call(acme.url, "POST", "/v1/acme/train", {"training_file": "nope"}).error(400, "file_not_found", "training_file")
    call(acme.url, "GET", "/v1/acme/follow/nope").error(404, "fine_tune_not_found", "fine_tune_id")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        pytest.param(b'{"training_file": 3}', "invalid_type", "training_file", id="row-42"),
        pytest.param(b"{}", "missing_required_parameter", "training_file", id="row-41"),
        pytest.param(b"[" * 200_000, "invalid_json", None, id="row-39-deep"),
        pytest.param(b'"\xff"', "invalid_json", None, id="row-39-not-utf8"),
        pytest.param(b"{", "invalid_request", None, id="row-38"),
    ],
)
def test_bodies_of_plugin_routes(acme: LiveServer, body: bytes, code: str, param: str | None) -> None:
    answer = call(acme.url, "POST", "/v1/acme/train", body, {"content-type": "application/json"})
    answer.error(400, code, param)


def test_a_plugin_that_fails(acme: LiveServer) -> None:
    error = call(acme.url, "GET", "/v1/acme/fail").error(500, "internal_error")
    assert "secret" not in error["message"]
    assert "a secret of ours" in acme.log


def test_plugin_routes_are_in_the_document(acme: LiveServer) -> None:
    document = call(acme.url, "GET", "/schema/openapi.json").json
    operation = document["paths"]["/v1/acme/train"]["post"]
    assert (operation["operationId"], operation["summary"]) == ("acmeTrain", "Train, the acme way.")
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["required"] == ["training_file"]


def test_plugins_are_listed(acme: LiveServer) -> None:
    names = [plugin["name"] for plugin in call(acme.url, "GET", "/v1/arbor/plugins").json["data"]]
    assert "arbor-acme 1.0" in names
