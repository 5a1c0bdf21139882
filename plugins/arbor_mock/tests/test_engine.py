"""The engine process, driven by the real client."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import asynccontextmanager

import aiohttp
import openai
import pytest

from arbor_core import ArborError, Weights

MODEL = "mock/tiny"
PATIENCE = 120.0
HELLO = [{"role": "user", "content": "hello wörld out there"}]


@asynccontextmanager
async def client_of(engine, key="secret", strict=True):
    """OpenAI's client. Its types do not allow the null that OpenAI sends as `finish_reason` of a plain completion's
    chunk, so those streams are read without validation."""
    async with openai.AsyncOpenAI(
        base_url=f"{engine.url}/v1", api_key=key, max_retries=0, _strict_response_validation=strict
    ) as client:
        yield client


async def health(engine):
    async with aiohttp.ClientSession() as session, session.get(f"{engine.url}/health") as answer:
        return await answer.json()


async def texts(chunks, into):
    """Collect what a stream says, as far as it goes."""
    async for chunk in chunks:
        into.append(chunk.choices[0].text)


async def until(engine, **expected):
    """Wait until health shows these numbers."""
    async with asyncio.timeout(PATIENCE):
        while not expected.items() <= (await health(engine)).items():
            await asyncio.sleep(0.01)


async def test_greedy_repeats_the_words_and_sampling_permutes_them(engine):
    async with client_of(await engine()) as client:
        greedy = await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
        assert greedy.choices[0].message.content == HELLO[0]["content"]
        assert greedy.model == MODEL
        assert greedy.choices[0].finish_reason == "stop"
        sampled = [
            (await client.chat.completions.create(model=MODEL, messages=HELLO, seed=seed, n=3)).choices
            for seed in (1, 1, 2)
        ]
        texts = [[choice.message.content for choice in choices] for choices in sampled]
        assert texts[0] == texts[1] != texts[2]
        assert len(set(texts[0])) > 1
        assert all(sorted(text.split()) == sorted(HELLO[0]["content"].split()) for text in texts[0])


@pytest.mark.parametrize(
    "options", [{}, {"stop": "out"}, {"max_tokens": 8}, {"n": 2, "extra_body": {"min_tokens": 40}}]
)
async def test_a_stream_says_what_the_whole_answer_says(engine, options):
    async with client_of(await engine()) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=HELLO, **options)
        texts = ["" for _ in whole.choices]
        reasons = [None for _ in whole.choices]
        usage = None
        chunks = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}, **options
        )
        async for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert texts == [choice.message.content for choice in whole.choices]
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert usage == whole.usage


async def test_stop_strings_and_limits(engine):
    async with client_of(await engine()) as client:
        stopped = await client.completions.create(model=MODEL, prompt="a b c", temperature=0, stop=["b", "c"])
        assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("a ", "stop")
        at_once = await client.completions.create(model=MODEL, prompt="a b c", temperature=0, stop=["a"])
        assert (at_once.choices[0].text, at_once.choices[0].finish_reason) == ("", "stop")
        short = await client.completions.create(model=MODEL, prompt="word " * 9, extra_body={"ignore_eos": True})
        assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (16, "length")


async def test_log_probabilities_have_openais_shape(engine):
    async with client_of(await engine()) as client:
        chat = await client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3)
        entries = chat.choices[0].logprobs.content
        assert len(entries) == chat.usage.completion_tokens
        assert bytes(byte for entry in entries for byte in entry.bytes).decode() == chat.choices[0].message.content
        assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
        plain = (await client.completions.create(model=MODEL, prompt="a b", logprobs=2)).choices[0].logprobs
        assert plain.text_offset == [0, 1, 2]
        assert len(plain.tokens) == len(plain.token_logprobs) == len(plain.top_logprobs) == 3


async def test_token_ids_are_bytes(engine):
    async with client_of(await engine()) as client:
        answer = await client.completions.create(
            model=MODEL, prompt=[104, 105], temperature=0, extra_body={"return_token_ids": True}
        )
        assert answer.choices[0].text == "hi"
        assert (answer.model_extra["prompt_token_ids"], answer.choices[0].model_extra["token_ids"]) == ([104, 105],) * 2
        several = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, temperature=0)
        assert [(choice.index, choice.text) for choice in several.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


@pytest.mark.parametrize(
    ("request_", "status", "code", "param"),
    [
        pytest.param({"prompt": [256]}, 400, "invalid_value", "prompt", id="row-137"),
        pytest.param({"prompt": "x", "max_tokens": 4096}, 400, "context_length_exceeded", "prompt", id="row-120"),
        pytest.param({"prompt": "x", "max_tokens": 4097}, 400, "invalid_value", "max_tokens", id="row-120-alone"),
        pytest.param({"prompt": "x", "model": "other"}, 404, "model_not_found", "model", id="row-117"),
        pytest.param({"prompt": "[mock: full=1]"}, 429, "rate_limit_exceeded", None, id="row-135"),
        pytest.param(
            {"prompt": "[mock: logprob=nan]", "logprobs": 1}, 500, "engine_numerical_error", None, id="row-134"
        ),
        pytest.param({"prompt": "[mock: fail_after_tokens=1]"}, 500, "engine_failure", None, id="failure"),
        pytest.param({"prompt": "[mock: sing=1]"}, 400, "invalid_value", None, id="unknown-fault"),
        pytest.param({"prompt": "[mock: hang=maybe]"}, 400, "invalid_value", None, id="no-number"),
    ],
)
async def test_refusals_have_the_envelope(engine, request_, status, code, param):
    async with client_of(await engine()) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(**{"model": MODEL, **request_})
        assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
        assert (await client.completions.create(model=MODEL, prompt="still here")).choices


async def test_minus_infinity_has_openais_number(engine):
    async with client_of(await engine()) as client:
        answer = await client.completions.create(model=MODEL, prompt="[mock: logprob=-inf] a", logprobs=1)
        assert answer.choices[0].logprobs.token_logprobs == [-9999.0]


async def test_an_engine_demands_its_token(engine):
    live = await engine()
    async with client_of(live, key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    assert await live.health()


async def test_adapters_are_loaded_and_unloaded_by_name(engine, adapter):
    live = await engine()
    async with client_of(live) as client:
        await live.load_weights(Weights("ft:one", str(adapter)))
        base, tuned = [
            (await client.chat.completions.create(model=model, messages=HELLO, n=8)).choices
            for model in (MODEL, "ft:one")
        ]
        assert [choice.message.content for choice in base] != [choice.message.content for choice in tuned]
        assert [model.id async for model in client.models.list()] == [MODEL, "ft:one"]
        await live.unload("ft:one")
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="ft:one", messages=HELLO)


async def test_unloading_waits_for_those_that_run(engine, adapter):
    live = await engine()
    await live.load_weights(Weights("ft:one", str(adapter)))
    async with client_of(live) as client:
        slow = [{"role": "user", "content": "[mock: token_seconds=0.2] one two three four"}]
        running = asyncio.create_task(client.chat.completions.create(model="ft:one", messages=slow))
        await until(live, running=1)
        await live.unload("ft:one")
        assert running.done() or (await health(live))["running"] == 0
        assert (await running).choices[0].finish_reason == "stop"


async def test_what_is_no_adapter_is_refused(engine, tmp_path):
    live = await engine()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ArborError, match="cut off"):
        await live.load_weights(Weights("ft:bad", str(tmp_path)))
    with pytest.raises(ArborError, match="No adapter"):
        await live.unload("ft:bad")


@pytest.mark.parametrize("stream", [False, True], ids=["row-128", "row-127"])
async def test_a_client_that_goes_away_frees_its_place(engine, stream):
    live = await engine(max_running=1)
    async with client_of(live, strict=False) as client:
        slow = "[mock: token_seconds=0.1] " + "word " * 100
        asked = asyncio.create_task(client.completions.create(model=MODEL, prompt=slow, max_tokens=400, stream=stream))
        if stream:
            chunks = await asked
            await anext(aiter(chunks))
            await chunks.close()
        else:
            await until(live, running=1)
            asked.cancel()
        await until(live, running=0)
        assert (await client.completions.create(model=MODEL, prompt="next")).choices


async def test_more_than_may_wait_are_refused(engine):
    live = await engine(max_running=1, max_waiting=1)
    async with client_of(live) as client:
        tasks = [asyncio.create_task(client.completions.create(model=MODEL, prompt="[mock: hang=1]"))]
        await until(live, running=1)
        tasks.append(asyncio.create_task(client.completions.create(model=MODEL, prompt="second")))
        await until(live, waiting=1)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model=MODEL, prompt="third")
        assert caught.value.response.headers["retry-after"] == "1"
        tasks[0].cancel()
        assert (await tasks[1]).choices[0].text == "second"


async def test_the_process_dies_when_told(engine):
    live = await engine()
    async with client_of(live, strict=False) as client:
        chunks = await client.completions.create(
            model=MODEL, prompt="[mock: die_after_tokens=2] abcdef", stream=True, temperature=0
        )
        seen: list[str] = []
        with pytest.raises(Exception, match="(?i)closed|incomplete|connection|read"):
            await texts(chunks, seen)
        assert seen == ["a", "b"]
    assert "told to die after 2 tokens" in await live.wait()


async def test_the_process_ends_with_its_parent(engine):
    live = await engine()
    live.process.stdin.close()
    assert "exit status 0" in await asyncio.wait_for(live.wait(), PATIENCE)


async def test_sigterm_tells_a_stream_why_it_ends(engine):
    live = await engine()
    async with client_of(live, strict=False) as client:
        chunks = await client.completions.create(
            model=MODEL, prompt="[mock: token_seconds=0.05] " + "word " * 50, stream=True, max_tokens=200
        )
        await anext(aiter(chunks))
        live.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            await texts(chunks, [])
        assert caught.value.code == "engine_unavailable"
    await asyncio.wait_for(live.wait(), PATIENCE)


async def test_an_engine_that_cannot_start_says_why(engine):
    with pytest.raises(ArborError, match="no such weights"):
        await engine(load_error="no such weights")


async def test_a_page_in_place_of_an_answer(engine):
    live = await engine()
    async with aiohttp.ClientSession(headers=live.headers) as session:
        body = {"model": MODEL, "prompt": "[mock: status=502]"}
        async with session.post(f"{live.url}/v1/completions", data=json.dumps(body)) as answer:
            assert (answer.status, answer.content_type) == (502, "text/html")
