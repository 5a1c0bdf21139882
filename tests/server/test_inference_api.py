"""Chat and plain completions against a real server with the mock engine, through the real client and raw sockets."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from completions import CHAT, MODEL, PLAIN, asked, engine_health, frames, post
from http_calls import call, raw_socket
from live import LiveServer, engine_dir, launch, process_of
from waiting import has_ended, until

HELLO = [{"role": "user", "content": "hello wörld out there"}]
SCHEMAS = json.loads((Path(__file__).parents[1] / "fixtures" / "openai-schemas.json").read_text())["$defs"]
FREED_SECONDS = 20.0
"""Half as long as the answers take that their clients leave."""


def conforms(value: Any, name: str) -> None:
    """Whether an object is what OpenAI's document says."""
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMAS}).validate(value)


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose engine dies now and then."""
    live = launch(tmp_path_factory.mktemp("breakable"))
    yield live
    live.stop()


# --- what is answered ------------------------------------------------------------------------------------------------


def test_a_chat(server: LiveServer) -> None:
    answer = server.client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, n=2)
    assert [choice.message.content for choice in answer.choices] == [HELLO[0]["content"]] * 2
    assert answer.model == MODEL
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id.startswith("req_")


def test_a_streamed_chat_says_the_same(server: LiveServer) -> None:
    options = {"model": MODEL, "messages": HELLO, "seed": 3, "stop": ["the"]}
    whole = server.client.chat.completions.create(**options)
    chunks = list(server.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices} == {None, "stop"}


def test_plain_completions(server: LiveServer) -> None:
    answer = server.client.completions.create(model=MODEL, prompt=["a", "b c"], temperature=0, logprobs=2)
    assert [choice.text for choice in answer.choices] == ["a", "b c"]
    assert answer.choices[1].logprobs.tokens == ["b", " ", "c"]
    ids = server.client.completions.create(model=MODEL, prompt=[104, 105], extra_body={"return_token_ids": True})
    assert (ids.choices[0].text, ids.choices[0].model_extra["token_ids"]) == ("hi", [104, 105])
    raw = post(server, PLAIN, {"model": MODEL, "prompt": "x y", "temperature": 0, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert "".join(event["choices"][0]["text"] for event in frames(raw.body)) == "x y"


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2, "max_tokens": 3}])
def test_answers_have_openais_shape(server: LiveServer, more: dict[str, Any]) -> None:
    conforms(post(server, CHAT, asked("one two", **more)).json, "CreateChatCompletionResponse")
    for event in frames(post(server, CHAT, asked("one two", stream=True, **more)).body):
        conforms(event, "CreateChatCompletionStreamResponse")
    plain = {**more, "logprobs": 1} if "logprobs" in more else more
    plain.pop("top_logprobs", None)
    conforms(post(server, PLAIN, {"model": MODEL, "prompt": "one", **plain}).json, "CreateCompletionResponse")


@pytest.mark.parametrize("prefix", ["openai/", "arbor:", "local:", "huggingface/"])
def test_prefixes_of_other_clients_mean_nothing(server: LiveServer, prefix: str) -> None:
    answer = server.client.chat.completions.create(model=prefix + MODEL, messages=HELLO)
    assert answer.model == MODEL


def test_what_clients_send_along_is_accepted(server: LiveServer) -> None:
    along = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "verbosity": "low",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tool_choice": "none",
        "functions": None,
        "audio": None,
        "stop": None,
        "logit_bias": None,
    }
    assert post(server, CHAT, asked("hi", **along)).json["choices"][0]["message"]["content"] == "hi"
    stream = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert frames(post(server, CHAT, asked("hi", **stream)).body)


def test_extensions_reach_the_engine(server: LiveServer) -> None:
    more = {"ignore_eos": True, "max_tokens": 7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2}
    answer = post(server, CHAT, asked("hi", return_token_ids=True, stop_token_ids=[0], **more)).json
    assert answer["usage"]["completion_tokens"] == 7
    assert len(answer["choices"][0]["token_ids"]) == 7


def test_conversations_with_tools_pass(server: LiveServer) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": "what is the time?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
    body = {"model": MODEL, "messages": messages, "tools": tools, "tool_choice": "auto"}
    assert post(server, CHAT, body).json["choices"][0]["message"]["content"] == "noon"


def test_a_fine_tuned_model_and_its_checkpoints_answer_until_deleted(
    server: LiveServer, chat_rows: list[dict[str, Any]]
) -> None:
    hyperparameters = {"steps": 4, "checkpoint_steps": 2}
    job = server.client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=server.upload(chat_rows),
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    name = server.wait(job.id).fine_tuned_model
    checkpoints = server.client.fine_tuning.jobs.checkpoints.list(job.id).data
    names = [name, *(checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints)]
    texts = set()
    for model in names:
        answer = server.client.chat.completions.create(model=model, messages=HELLO, n=12, seed=1)
        assert answer.model == model
        texts.add(tuple(choice.message.content for choice in answer.choices))
    assert len(texts) == len(names) == 3
    assert set(names) <= set(engine_health(server)["adapters"])
    server.client.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model=name, messages=HELLO)
    until(lambda: name not in engine_health(server)["adapters"])


# --- what is refused -------------------------------------------------------------------------------------------------

BOTH = {
    "row-119-zero": ({"n": 0}, "integer_below_min_value", "n"),
    "row-119-129": ({"n": 129}, "integer_above_max_value", "n"),
    "row-119-huge": ({"n": 10**9}, "integer_above_max_value", "n"),
    "row-119-float": ({"n": 1.5}, "invalid_type", "n"),
    "row-120-zero": ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    "row-120-negative": ({"max_tokens": -1}, "invalid_value", "max_tokens"),
    "row-120-context": ({"max_tokens": 5000}, "invalid_value", "max_tokens"),
    "row-120-huge": ({"max_tokens": 10**30}, "invalid_value", "max_tokens"),
    "row-121-below": ({"temperature": -1}, "decimal_below_min_value", "temperature"),
    "row-121-above": ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    "row-121-word": ({"temperature": "hot"}, "invalid_type", "temperature"),
    "row-121-top-p-zero": ({"top_p": 0}, "decimal_below_min_value", "top_p"),
    "row-121-top-p": ({"top_p": 1.1}, "decimal_above_max_value", "top_p"),
    "row-121-presence": ({"presence_penalty": 3}, "decimal_above_max_value", "presence_penalty"),
    "row-121-frequency": ({"frequency_penalty": -3}, "decimal_below_min_value", "frequency_penalty"),
    "row-123-token": ({"logit_bias": {"word": 1}}, "invalid_type", "logit_bias"),
    "row-123-negative": ({"logit_bias": {"-4": 1}}, "invalid_value", "logit_bias"),
    "row-123-value": ({"logit_bias": {"4": 101}}, "decimal_above_max_value", "logit_bias"),
    "row-124-five": ({"stop": ["a", "b", "c", "d", "e"]}, "array_above_max_length", "stop"),
    "row-124-empty": ({"stop": ["a", ""]}, "invalid_value", "stop"),
    "row-124-empty-text": ({"stop": ""}, "invalid_value", "stop"),
    "unknown": ({"temprature": 1}, "unknown_parameter", "temprature"),
    "seed": ({"seed": 1 << 63}, "integer_above_max_value", "seed"),
    "stream-options": ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    "stream-option": ({"stream": True, "stream_options": {"usage": 1}}, "unknown_parameter", "stream_options.usage"),
    "model": ({"model": 5}, "invalid_type", "model"),
    "stop-token": ({"stop_token_ids": [-1]}, "integer_below_min_value", "stop_token_ids[0]"),
}


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize(("wrong", "code", "param"), [pytest.param(*case, id=row) for row, case in BOTH.items()])
def test_wrong_parameters(server: LiveServer, path: str, wrong: dict[str, Any], code: str, param: str) -> None:
    good: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    post(server, path, {"model": MODEL, **good, **wrong}).error(400, code, param)


def test_an_unknown_parameter_is_answered_with_the_nearest(server: LiveServer) -> None:
    answer = post(server, CHAT, asked("x", max_completion_token=5))
    said = answer.error(400, "unknown_parameter", "max_completion_token")
    assert "Did you mean 'max_completion_tokens'?" in said["message"]


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
CALLS = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}


def deep_tool(depth: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"a": json.loads("[" * depth + "]" * depth)}}}


CHATS = {
    "row-122-empty": ({"messages": []}, "invalid_value", "messages"),
    "row-122-none": ({"messages": None}, "invalid_type", "messages"),
    "row-122-role": ({"messages": [*HELLO, {"role": "wizard", "content": "x"}]}, "invalid_value", "messages[1].role"),
    "row-122-no-role": ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
    "row-122-no-content": ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    "row-122-number": ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
    "row-122-silent": ({"messages": [{"role": "assistant"}]}, "missing_required_parameter", "messages[0].content"),
    "row-122-tool": (
        {"messages": [*HELLO, {"role": "tool", "content": "x"}]},
        "missing_required_parameter",
        "messages[1].tool_call_id",
    ),
    "row-122-call": ({"messages": [CALLS]}, "missing_required_parameter", "messages[0].tool_calls[0].id"),
    "row-122-unknown": (
        {"messages": [{**HELLO[0], "mood": "good"}]},
        "unknown_parameter",
        "messages[0].mood",
    ),
    "row-122-image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, IMAGE]}]},
        "invalid_value",
        "messages[0].content[1].type",
    ),
    "row-123-top": ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    "row-123-21": ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    "row-120-completion": ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
    "tools": ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
    "tools-deep": ({"tools": [deep_tool(70)]}, "invalid_value", "tools[0]"),
    "tools-deeper": ({"tools": [deep_tool(900)]}, "invalid_value", "tools[0]"),
    "functions": ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
    "audio": ({"audio": {"voice": "alloy", "format": "mp3"}}, "unsupported_parameter", "audio"),
    "modalities": ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities[1]"),
    "search": ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
    "store": ({"store": True}, "unsupported_parameter", "store"),
    "format": ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format.type"),
    "row-126": (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "unsupported_parameter",
        "tool_choice",
    ),
}


@pytest.mark.parametrize(("wrong", "code", "param"), [pytest.param(*case, id=row) for row, case in CHATS.items()])
def test_wrong_chats(server: LiveServer, wrong: dict[str, Any], code: str, param: str) -> None:
    post(server, CHAT, {**asked("x"), **wrong}).error(400, code, param)


PROMPTS = {
    "none": ({}, "missing_required_parameter"),
    "empty": ({"prompt": []}, "invalid_value"),
    "empty-ids": ({"prompt": [[1], []]}, "invalid_value"),
    "mixed": ({"prompt": ["a", 1]}, "invalid_type"),
    "number": ({"prompt": 5}, "invalid_type"),
    "many": ({"prompt": ["a"] * 2049}, "invalid_value"),
    "row-137-negative": ({"prompt": [5, -1]}, "invalid_value"),
    "row-137-negative-second": ({"prompt": [[5], [-1]]}, "invalid_value"),
    "row-137-vocabulary": ({"prompt": [5, 256]}, "invalid_value"),
    "row-137-huge": ({"prompt": [5, 1 << 70]}, "invalid_value"),
}


@pytest.mark.parametrize(("prompt", "code"), [pytest.param(*case, id=row) for row, case in PROMPTS.items()])
def test_wrong_prompts(server: LiveServer, prompt: dict[str, Any], code: str) -> None:
    post(server, PLAIN, {"model": MODEL, **prompt}).error(400, code, "prompt")


@pytest.mark.parametrize("more", [{"echo": True}, {"suffix": "end"}, {"best_of": 3}])
def test_what_no_engine_can_do_is_refused(server: LiveServer, more: dict[str, Any]) -> None:
    post(server, PLAIN, {"model": MODEL, "prompt": "x", **more}).error(400, "unsupported_parameter", next(iter(more)))


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"[]", id="array"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(b'{"model": "\xff"}', id="not-utf8"),
        pytest.param(b'{"model": "m", "temperature": NaN}', id="row-121-nan"),
    ],
)
def test_what_is_no_json_object(server: LiveServer, path: str, raw: bytes) -> None:
    post(server, path, raw).error(400, "invalid_json")


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("nothing", id="row-117-base"),
        pytest.param("ft:mock/tiny:arbor::12345678", id="row-117-adapter"),
        pytest.param("ft:x\0y", id="row-117-nul"),
    ],
)
def test_unknown_models(server: LiveServer, path: str, model: str) -> None:
    good: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    post(server, path, {"model": model, **good}).error(404, "model_not_found", "model")


@pytest.mark.parametrize("model", ["../../etc/passwd", "/etc/passwd", "https://example.com/m", ""])
def test_names_that_cannot_be_models(server: LiveServer, model: str) -> None:
    post(server, CHAT, {**asked("x"), "model": model}).error(400, "invalid_model", "model")


def test_row_120_prompt_and_answer_beyond_the_context(server: LiveServer) -> None:
    text = "word " * 1000
    post(server, CHAT, asked(text)).error(400, "context_length_exceeded", "messages")
    post(server, PLAIN, {"model": MODEL, "prompt": text}).error(400, "context_length_exceeded", "prompt")


def test_row_135_a_full_queue(server: LiveServer) -> None:
    answer = post(server, CHAT, asked("[mock: full=1]"))
    assert answer.error(429, "rate_limit_exceeded")["type"] == "rate_limit_error"
    assert answer.headers["retry-after"] == "1"
    post(server, CHAT, asked("[mock: full=1]", stream=True)).error(429, "rate_limit_exceeded")


def test_row_134_log_probabilities_that_json_cannot_hold(server: LiveServer) -> None:
    good = server.client.completions.create(model=MODEL, prompt="[mock: logprob=-inf] a", logprobs=1)
    assert good.choices[0].logprobs.token_logprobs == [-9999.0]
    bad = post(server, PLAIN, {"model": MODEL, "prompt": "[mock: logprob=nan] a", "logprobs": 1})
    bad.error(500, "engine_numerical_error")
    assert bad.headers["x-should-retry"] == "false"


def test_a_page_from_an_engine_is_not_passed_on(server: LiveServer) -> None:
    for stream in (False, True):
        said = post(server, CHAT, asked("[mock: status=502]", stream=stream)).error(502, "engine_error")
        assert "<" not in said["message"]


def test_an_error_of_the_engine_in_a_stream(server: LiveServer) -> None:
    chunks = server.client.chat.completions.create(**asked("[mock: fail_after_tokens=2] abc", stream=True))
    with pytest.raises(openai.APIError) as caught:
        list(chunks)
    assert caught.value.code == "engine_failure"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_wrong_methods(server: LiveServer, method: str) -> None:
    call(server.url, method, CHAT).error(405, "method_not_allowed")


def test_row_136_embeddings_are_not_served_yet(server: LiveServer) -> None:
    body = {"model": MODEL, "input": ["x"] * 2049}
    post(server, "/v1/embeddings", body).error(404, "unknown_url")


def test_a_key_is_demanded_where_there_are_keys(start_server: Callable[..., LiveServer]) -> None:
    locked = start_server("auth.keys=[one]")
    post(locked, CHAT, asked("x")).error(401, "invalid_api_key")
    client = locked.new_client("one")
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices


# --- clients that go, engines that die --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "stream"),
    [
        pytest.param(CHAT, True, id="row-127"),
        pytest.param(PLAIN, True, id="row-127-plain"),
        pytest.param(CHAT, False, id="row-128"),
        pytest.param(PLAIN, False, id="row-128-plain"),
    ],
)
def test_a_client_that_goes_away_frees_its_place(server: LiveServer, path: str, stream: bool) -> None:
    text = "[mock: token_seconds=0.1] " + "word " * 100
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    raw = json.dumps({"model": MODEL, **prompt, "stream": stream, "max_tokens": 400}).encode()
    post(server, CHAT, asked("start the engine"))
    with raw_socket(server.url) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        until(lambda: engine_health(server)["running"] == 1)
        if stream:
            assert b"data: " in connection.recv(4096) + connection.recv(4096)
    until(lambda: engine_health(server)["running"] == 0, FREED_SECONDS, pause=0.01)
    assert post(server, CHAT, asked("next")).status == 200


def test_row_130_an_engine_that_dies_before_the_first_token(breakable: LiveServer) -> None:
    for stream in (False, True):
        answer = post(breakable, CHAT, asked("[mock: die_after_tokens=0]", stream=stream))
        answer.error(503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert breakable.client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0).choices


def test_row_130_an_engine_that_dies_while_it_answers_at_length(breakable: LiveServer) -> None:
    answer = post(breakable, PLAIN, {"model": MODEL, "prompt": "[mock: die_after_tokens=5] abcdefgh"})
    answer.error(503, "engine_unavailable")


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_row_131_an_engine_that_dies_in_a_stream(breakable: LiveServer, path: str) -> None:
    text = "[mock: token_seconds=0.01, die_after_tokens=3] abcdefgh"
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    answer = post(breakable, path, {"model": MODEL, **prompt, "stream": True})
    assert answer.status == 200
    events = frames(answer.body)
    assert events[-1]["error"]["code"] == "engine_dead"
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert len(events) > 3
    with pytest.raises(openai.APIError) as caught:
        list(
            breakable.new_client(_strict_response_validation=False).post(
                path.removeprefix("/v1"),
                body={"model": MODEL, **prompt, "stream": True},
                cast_to=openai.types.Completion,
                stream=True,
                stream_cls=openai.Stream[openai.types.Completion],
            )
        )
    assert caught.value.code == "engine_dead"


def test_an_engine_that_was_killed_is_started_again(breakable: LiveServer) -> None:
    breakable.client.chat.completions.create(model=MODEL, messages=HELLO)
    folder = engine_dir(breakable)
    os.kill(process_of(folder), signal.SIGKILL)
    with breakable.new_client(max_retries=2) as patient:
        assert patient.chat.completions.create(model=MODEL, messages=HELLO).choices
    assert engine_dir(breakable) != folder
    assert "engine of mock/tiny" in breakable.log


def test_engines_end_with_the_server(start_server: Callable[..., LiveServer]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        live = start_server()
        live.client.chat.completions.create(model=MODEL, messages=HELLO)
        process = process_of(engine_dir(live))
        live.stop(number)
        until(lambda process=process: has_ended(process))


def test_an_engine_that_cannot_start_is_answered_at_once(start_server: Callable[..., LiveServer]) -> None:
    live = start_server("+engine.load_error='not these weights'")
    for stream in (False, True):
        answer = post(live, CHAT, asked("x", stream=stream))
        assert "not these weights" in answer.error(503, "engine_unavailable")["message"]
        assert answer.headers["x-should-retry"] == "false"
