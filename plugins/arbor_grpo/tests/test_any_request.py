"""Whatever is sent to GRPO's routes, in the shape of the server's OpenAPI document or out of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import api_requests
import pytest
import schemathesis
from api_requests import EXAMPLES, KEY, Api, busy, cases, hold_the_device, labels, look, look_oddly
from arbor_grpo.api.routes import routes
from grpo_http import GRPO, MODEL, item
from http_calls import call
from hypothesis import settings
from live import LiveServer

OPERATIONS = labels(routes(SimpleNamespace(changed=None)))  # type: ignore[arg-type]
ENDING = ("checkpoint", "cancel", "terminate")
"""Operations that wait for a job."""
LOOK = settings(api_requests.LOOK, max_examples=EXAMPLES or 8)
"""Groups take long to make up."""
pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 600)


class Lessons(Api):
    """A server with a job that learns and waits for a device, and one that has succeeded."""

    ended = ""

    def fill_in(self, case: Any) -> None:
        super().fill_in(case)
        if isinstance(case.body, dict) and case.body.get("batch"):
            case.body["batch"] = [item(0.5), item(1)]

    def tame(self, case: Any) -> None:
        body = case.body if isinstance(case.body, dict) else {}
        if "wait" in body:
            body["wait"] = min(body["wait"], 0.01) if isinstance(body["wait"], int | float) else body["wait"]
        if case.path.endswith(ENDING):
            place = case.path_parameters if "{job_id}" in case.path else body
            if place and place.get("job_id") in (None, self.known["job_id"]):
                place["job_id"] = self.ended


def ask(live: LiveServer, path: str, **body: Any) -> dict[str, Any]:
    answer = call(live.url, "POST", f"{GRPO}/{path}", body, {"authorization": f"Bearer {KEY}"})
    assert answer.status == 200, answer.body
    return dict(answer.json)


def learning(live: LiveServer, **trainer: Any) -> str:
    """A job whose groups have two members."""
    return str(ask(live, "initialize", model=MODEL, trainer_config={"num_generations": 2, **trainer})["job_id"])


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lessons]:
    with busy(tmp_path_factory.mktemp("any"), key=KEY, strict=False) as live:
        ended = learning(live, max_steps=1)
        ask(live, "step", job_id=ended, batch=[item(0), item(1)])
        assert live.wait(ended).status == "succeeded"
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        hold_the_device(live, live.upload([row] * 10))
        schema = schemathesis.openapi.from_url(f"{live.url}/schema/openapi.json")
        found = Lessons(live, schema, guarded=True, known={"model": MODEL}, doomed={})
        found.ended = ended
        yield found


@pytest.mark.parametrize(("label", "mode"), cases(OPERATIONS))
def test_any_request_gets_a_proper_answer(api: Lessons, label: str, mode: schemathesis.GenerationMode) -> None:
    api.known["job_id"] = learning(api.server)
    look(api, label, mode, LOOK)


@pytest.mark.parametrize("label", OPERATIONS)
def test_odd_paths_queries_and_headers_get_a_proper_answer(api: Lessons, label: str) -> None:
    look_oddly(api, label)
