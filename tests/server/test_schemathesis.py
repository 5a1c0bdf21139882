"""Whatever is sent to a route of our own OpenAPI document, in its shape or out of it: no 5xx, errors in the envelope,
answers as the document says. `API_EXAMPLES=1000` looks longer and elsewhere each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from api_requests import EXAMPLES, KEY, Api, busy, cases, hold_the_device, labels, look, look_oddly
from http_calls import BASE, JOBS, call, submit
from live import LiveServer

from arbor_core.server.app import ROUTE_MODULES

OPERATIONS = labels(
    handler
    for module in ROUTE_MODULES
    for handler in module.ROUTES
    if "summary" in handler.opt and handler.operation_id != "getOpenAPIDocument"
)
"""Those of the core, but for the document itself, which every test has to read."""
pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 600)


def started(live: LiveServer, guarded: bool) -> Api:
    """Make the objects; a job that never ends holds the only device, so that no other begins."""
    client = live.client
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = live.upload([row] * 10)
    done = [client.fine_tuning.jobs.create(model=BASE, training_file=rows) for _ in range(2)]
    models = [str(live.wait(job.id).fine_tuned_model) for job in done]
    for model in (BASE, *models):  # loaded before anything is measured by it
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])
    hold_the_device(live, rows)
    waiting = client.fine_tuning.jobs.create(model=BASE, training_file=rows).id
    known = {"file_id": rows, "training_file": rows, "job_id": waiting, "model": models[0], "name": "mock"}
    known["upload_id"] = client.uploads.create(bytes=2, filename="a", mime_type="text/plain", purpose="fine-tune").id
    doomed = {"file_id": live.upload(b"{}\n"), "model": models[1]}
    schema = schemathesis.openapi.from_url(f"{live.url}/schema/openapi.json")
    return Api(live, schema, guarded, known, doomed)


@pytest.fixture(scope="module", params=["open", "keys"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    guarded = request.param == "keys"
    key = KEY if guarded else None
    with busy(tmp_path_factory.mktemp("api"), "limits.upload_idle_seconds=2", key=key) as live:
        yield started(live, guarded)


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
