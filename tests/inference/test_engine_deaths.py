"""An engine is killed at each point of its life: what its clients hear, and that the next request fares better.

One story, from the first request to a model until its device is needed for another one. Whatever the engine does when
it dies, at most one request hears of it, as an error that may be tried again; devices are given back; nothing is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from completions import CHAT, MODEL, asked, frames, post
from crash import ENGINE, ENGINE_ALWAYS, check_the_rest, marked
from http_calls import JOBS, Answer, call
from jobs import create
from live import LiveServer
from waiting import until

from arbor_core.testing.invariants import Seen

CHOSEN = ("inference=mock_direct", "gpu.inference=[4,5]", "engine.replicas=1", "engine.share=1")
"""Policies come from the trainer's memory; an engine takes both devices."""
HEARD = {
    "engine.starting": "first",
    "engine.loaded": "first",
    "engine.listening": "first",
    "completion.begun": "first",
    "completion.token": "stream",
    "completion.token:3": "stream",
    "adapter.loading": "adapter",
    "adapter.loaded": "adapter",
}
"""Which request is on its way at each point."""
UNHEARD = {"weights.fetched": ["policy"], "adapter.unloading": ["after"], "engine.stopping": []}
"""Where nobody waits, which requests may come before the server knows that the engine has died."""


@dataclass
class Story:
    """One client, who tries again what failed."""

    server: LiveServer
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Which requests failed, and with which code."""

    def ask(self, what: str, model: str, **more: Any) -> None:
        """Ask until there is an answer."""
        deadline = time.monotonic() + 120
        while code := failure(post(self.server, CHAT, asked(what, model=model, **more))):
            self.failures.append((what, code))
            assert time.monotonic() < deadline, self.server.log

    def publish(self) -> str:
        """A job whose policy an engine has to fetch; its id."""
        body = {"model": MODEL, "method": {"type": "mock_commands"}}
        job_id = str(call(self.server.url, "POST", JOBS, body).json["id"])
        url, path = self.server.url, f"/v1/mock/jobs/{job_id}"
        assert call(url, "POST", f"{path}/commands", {"number": 1, "do": "publish"}).status == 200
        until(lambda: call(url, "GET", f"{path}/results?after=0&seconds=5").json["data"])
        return job_id

    def tell(self, rows: list[dict[str, Any]]) -> None:
        tuned = self.server.wait(create(self.server, rows).id).fine_tuned_model
        self.ask("first", MODEL)
        self.ask("stream", MODEL, stream=True)
        self.ask("adapter", tuned)
        job_id = self.publish()
        self.ask("policy", job_id)
        call(self.server.url, "POST", f"/v1/mock/jobs/{job_id}/finish")
        until(lambda: call(self.server.url, "GET", f"{JOBS}/{job_id}").json["status"] == "succeeded")
        assert self.server.client.models.delete(tuned).deleted
        self.ask("after", MODEL)
        self.ask("other", "mock/other")


def failure(answer: Answer) -> str:
    """The code of an answer that is an error, which may be tried again; empty: it is none."""
    if answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream"):
        return str(frames(answer.body)[-1].get("error", {}).get("code", ""))
    if answer.status == 200:
        return ""
    assert answer.status == 503, answer.body
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers.get("x-should-retry") != "false"
    return str(answer.json["error"]["code"])


@pytest.mark.parametrize("point", marked(ENGINE_ALWAYS, ENGINE))
def test_an_engine_that_dies_at(
    point: str, start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    once = tmp_path / "died"
    server = start_server(*CHOSEN, env={"ARBOR_CRASH_BELOW": point, "ARBOR_CRASH_ONCE": str(once)})
    seen = Seen(server.storage)
    story = Story(server)
    story.tell(chat_rows)
    assert once.exists(), f"no engine came to {point}"
    if point in HEARD:
        code = "engine_dead" if HEARD[point] == "stream" else "engine_unavailable"
        assert story.failures == [(HEARD[point], code)]
    else:
        assert {what for what, _ in story.failures} <= set(UNHEARD[point]), story.failures
        assert len(story.failures) <= 1
    devices = call(server.url, "GET", "/v1/arbor/devices").json["data"]
    owners = [[lease["owner"] for lease in one["leases"]] for one in devices if one["pools"] == ["engine"]]
    assert owners == [["engine:mock/other"]] * 2
    check_the_rest(server, seen)
