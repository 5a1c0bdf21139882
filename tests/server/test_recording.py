"""Completions of a live reinforcement job's model in its ledger: a real server, the mock engine and trainer."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from http_calls import JOBS, call, raw_socket
from live import LiveServer, launch
from waiting import until

from arbor_core.jobdir.groups import entry
from arbor_core.jobdir.inbox import Inbox
from arbor_core.process.wakeup import wake
from arbor_core.rollouts.completion_ledger import Ledger, key_of
from arbor_core.types import Completion, Group, Rollout

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "hello wörld out there"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = launch(tmp_path_factory.mktemp("recording"), "trainers.mock_grpo.groups_per_step=1")
    yield live
    live.cancel_all()
    live.stop()


@pytest.fixture(scope="module")
def job(server: LiveServer) -> str:
    return create(server)


def create(server: LiveServer) -> str:
    """A job that learns from rollouts."""
    return str(call(server.url, "POST", JOBS, {"model": "mock/tiny", "method": {"type": "grpo"}}, JSON).json["id"])


def status(server: LiveServer, job: str) -> str:
    return str(call(server.url, "GET", f"{JOBS}/{job}").json["status"])


def ledger(server: LiveServer, job: str) -> Ledger:
    """A second look at the ledger's files."""
    return Ledger(server.storage / "jobs" / job / "ledger")


def recorded(server: LiveServer, job: str, id: str, index: int = 0) -> Completion | None:
    found = ledger(server, job)
    try:
        return found.get(id, index)
    finally:
        found.close()


def ids(raw: bytes) -> list[int]:
    return list(array("i", raw))


def text_of(raw: bytes) -> str:
    """The mock's tokens are bytes."""
    return bytes(ids(raw)).decode()


def chunks(raw: bytes) -> list[dict[str, Any]]:
    assert raw.endswith(b"data: [DONE]\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in raw.decode().split("\n\n")[:-2]]


def test_a_completion_is_recorded_and_its_answer_says_no_more_than_was_asked_for(server: LiveServer, job: str) -> None:
    plain = call(server.url, "POST", CHAT, {"model": "mock/tiny", "messages": HELLO, "seed": 3}, JSON)
    assert "policy_version" not in plain.json
    assert "x-arbor-policy-version" not in plain.headers
    live = call(server.url, "POST", CHAT, {"model": f"arbor:{job}", "messages": HELLO, "seed": 3}, JSON)
    assert live.headers["x-arbor-policy-version"] == "0"
    expected = {**plain.json, "id": live.json["id"], "created": live.json["created"], "model": job}
    assert live.json == {**expected, "policy_version": 0}
    found = recorded(server, job, live.json["id"])
    assert found is not None
    content = live.json["choices"][0]["message"]["content"]
    assert (text_of(found.tokens), text_of(found.prompt)) == (content, "user: hello wörld out there\n")
    assert len(found.logprobs) == len(found.tokens)
    assert (found.version, found.temperature, found.finish, found.toolset) == (0, 1.0, "stop", b"")
    assert found.key == key_of(HELLO, content)


def test_what_was_asked_for_stays(server: LiveServer, job: str) -> None:
    asked = {"messages": HELLO, "seed": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "stop": None}
    plain = call(server.url, "POST", CHAT, {"model": "mock/tiny", **asked}, JSON).json
    live = call(server.url, "POST", CHAT, {"model": job, **asked}, JSON).json
    assert live["choices"] == plain["choices"]
    assert live["prompt_token_ids"] == plain["prompt_token_ids"]
    found = recorded(server, job, live["id"])
    assert found is not None
    assert ids(found.tokens) == live["choices"][0]["token_ids"]
    said = [token["logprob"] for token in live["choices"][0]["logprobs"]["content"]]
    assert list(array("f", found.logprobs)) == pytest.approx(said)


def test_a_stream_is_recorded_choice_by_choice(server: LiveServer, job: str) -> None:
    asked = {"messages": HELLO, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
    plain = chunks(call(server.url, "POST", CHAT, {"model": "mock/tiny", **asked}, JSON).body)
    answer = call(server.url, "POST", CHAT, {"model": job, **asked}, JSON)
    assert answer.headers["x-arbor-policy-version"] == "0"
    live = chunks(answer.body)
    assert [chunk["choices"] for chunk in live] == [chunk["choices"] for chunk in plain]
    assert [set(chunk) for chunk in live] == [set(chunk) | {"policy_version"} for chunk in plain]
    for index in range(3):
        parts = [part for chunk in live for part in chunk["choices"] if part["index"] == index]
        found = recorded(server, job, live[0]["id"], index)
        assert found is not None
        assert text_of(found.tokens) == "".join(part["delta"].get("content") or "" for part in parts)


@pytest.mark.parametrize("stream", [False, True])
def test_plain_completions_are_recorded_prompt_by_prompt(server: LiveServer, job: str, stream: bool) -> None:
    body = {"model": job, "prompt": ["one two", "three four"], "n": 2, "stream": stream, "temperature": 0.5}
    answer = call(server.url, "POST", PLAIN, body, JSON)
    id = chunks(answer.body)[0]["id"] if stream else answer.json["id"]  # noqa: A001
    prompts = []
    for index in range(4):
        found = recorded(server, job, id, index)
        assert found is not None
        assert found.temperature == 0.5
        prompts.append(text_of(found.prompt))
    assert prompts == ["one two", "one two", "three four", "three four"]
    if not stream:
        assert all(choice["logprobs"] is None and "token_ids" not in choice for choice in answer.json["choices"])


def test_what_is_recorded_is_what_was_sampled(server: LiveServer, job: str) -> None:
    """A stop string is cut off the text, not off the tokens; a greedy completion is recorded as one."""
    body = {"model": job, "messages": HELLO, "temperature": 0, "stop": "ld"}
    answer = call(server.url, "POST", CHAT, body, JSON).json
    found = recorded(server, job, answer["id"])
    assert found is not None
    assert answer["choices"][0]["message"]["content"] == "hello wör"
    assert (text_of(found.tokens), found.temperature, found.finish) == ("hello wörld", 0.0, "stop")
    assert found.key == key_of(HELLO, "hello wör")
    short = call(server.url, "POST", CHAT, {"model": job, "messages": HELLO, "max_tokens": 2}, JSON).json
    cut = recorded(server, job, short["id"])
    assert cut is not None
    assert (len(ids(cut.tokens)), cut.finish) == (2, "length")


def test_a_client_that_leaves_records_nothing(server: LiveServer, job: str) -> None:
    before = set(ledger(server, job).places)
    text = f"[mock: token_seconds=0.02] {'many words ' * 20}"
    body = {"model": job, "messages": [{"role": "user", "content": text}], "stream": True}
    with raw_socket(server.url) as client:
        raw = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(raw)}\r\n\r\n"
        client.sendall(head.encode() + raw)
        while b"content" not in client.recv(65536):
            pass
    done = call(server.url, "POST", CHAT, {"model": job, "messages": HELLO}, JSON).json
    until(lambda: (done["id"], 0) in ledger(server, job).places)
    assert set(ledger(server, job).places) - before == {(done["id"], 0)}


def test_errors_are_passed_on_and_not_recorded(server: LiveServer, job: str) -> None:
    before = set(ledger(server, job).places)
    text = [{"role": "user", "content": "[mock: fail_after_tokens=2] some words"}]
    broken = call(server.url, "POST", CHAT, {"model": job, "messages": text, "stream": True}, JSON)
    assert chunks(broken.body)[-1]["error"]["code"] == "engine_failure"
    call(server.url, "POST", CHAT, {"model": job, "messages": text}, JSON).error(500, "engine_failure")
    call(server.url, "POST", CHAT, {"model": job, "messages": HELLO, "n": 0}, JSON).error(
        400, "integer_below_min_value", "n"
    )
    assert set(ledger(server, job).places) == before


def test_a_completion_after_a_step_comes_from_its_policy(server: LiveServer) -> None:
    """The trainer makes a step of a group, publishes, and the engine has the version before anybody asks."""
    job = create(server)
    until(lambda: status(server, job) == "running")
    folder = server.storage / "jobs" / job / "inbox"
    inbox = Inbox(folder)
    rollouts = tuple(Rollout(reward=float(n), completion=b"\1\0\0\0") for n in range(8))
    inbox.append([entry(Group(rollouts=rollouts, version=0), 1)])
    inbox.close()
    wake(folder / "bell", "")

    def version() -> int:
        answer = call(server.url, "POST", CHAT, {"model": job, "messages": HELLO}, JSON)
        found = recorded(server, job, answer.json["id"])
        assert found is not None
        assert answer.json["model"] == job
        assert found.version == answer.json["policy_version"] == int(answer.headers["x-arbor-policy-version"])
        return found.version

    until(lambda: version() == 1)
    call(server.url, "POST", f"{JOBS}/{job}/cancel")
    until(lambda: status(server, job) == "cancelled")
    ended = call(server.url, "POST", CHAT, {"model": job, "messages": HELLO}, JSON)
    assert ended.status == 200
    assert "policy_version" not in ended.json
