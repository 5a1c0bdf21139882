"""Whatever is sent to a route of our own OpenAPI document, in its shape or out of it: no 5xx, errors in the envelope,
answers as the document says. `API_EXAMPLES=1000` looks longer and elsewhere each time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from api_requests import EXAMPLES, KEY, Api, cases, labels, look, look_oddly
from http_calls import BASE, JOBS, call, submit, supervised
from live import LiveServer, launch

from arbor_core.server.app import ROUTE_MODULES

OPERATIONS = labels(
    handler
    for module in ROUTE_MODULES
    for handler in module.ROUTES
    if "summary" in handler.opt and handler.operation_id != "getOpenAPIDocument"
)
"""Those of the core, but for the document itself, which every test has to read."""
pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 180)


def started(live: LiveServer, guarded: bool) -> Api:
    """Make the objects; a job that never ends holds the only device, so that no other begins."""
    client = live.new_client(KEY, max_retries=20)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = live.upload([row] * 10)
    done = [client.fine_tuning.jobs.create(model=BASE, training_file=rows) for _ in range(2)]
    models = [str(live.wait(job.id).fine_tuned_model) for job in done]
    for model in (BASE, *models):  # loaded before anything is measured by it
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])
    endless: Any = supervised(steps=1_000_000, step_seconds=0.5)
    live.wait(client.fine_tuning.jobs.create(model=BASE, training_file=rows, method=endless).id, "running")
    waiting = client.fine_tuning.jobs.create(model=BASE, training_file=rows).id
    known = {"file_id": rows, "training_file": rows, "job_id": waiting, "model": models[0], "name": "mock"}
    known["upload_id"] = client.uploads.create(bytes=2, filename="a", mime_type="text/plain", purpose="fine-tune").id
    doomed = {"file_id": live.upload(b"{}\n"), "model": models[1]}
    schema = schemathesis.openapi.from_url(f"{live.url}/schema/openapi.json")
    return Api(live, schema, guarded, known, doomed)


@pytest.fixture(scope="module", params=["open", "keys"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    guarded = request.param == "keys"
    more = [f"auth.keys=[{KEY}]"] if guarded else []
    live = launch(tmp_path_factory.mktemp("api"), "gpu.train=[0]", "limits.upload_idle_seconds=2", *more)
    try:
        yield started(live, guarded)
        jobs = live.client.fine_tuning.jobs
        for job in jobs.list(limit=100):
            if job.status in ("validating_files", "queued", "running", "paused"):
                jobs.cancel(job.id)
                live.wait(job.id, "cancelled")
        assert "Traceback" not in live.log
    finally:
        live.stop()


@pytest.mark.parametrize(("label", "mode"), cases(OPERATIONS))
def test_any_request_gets_a_proper_answer(api: Api, label: str, mode: schemathesis.GenerationMode) -> None:
    look(api, label, mode)


@pytest.mark.parametrize("label", OPERATIONS)
def test_odd_paths_queries_and_headers_get_a_proper_answer(api: Api, label: str) -> None:
    look_oddly(api, label)


def test_the_document_has_every_operation(api: Api) -> None:
    assert {found.ok().label for found in api.schema.get_all_operations()} >= set(OPERATIONS)


def test_the_server_is_still_there(api: Api) -> None:
    assert submit(api.server, "file-none").status == (401 if api.guarded else 400)
    assert call(api.server.url, "GET", JOBS, headers={"authorization": f"Bearer {KEY}"}).status == 200
