"""What the engine generates, through its real process and the stock client, against transformers and PEFT."""

import asyncio
from typing import Any

import openai
import pytest
import torch
from embedded import Running, World, make_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

TOKENIZER = make_tokenizer()
PROMPTS = ["the quick", "héllo wörld 你好 " * 12, "x", "0123456789 " * 5, "lazy dog jumps over", "🙂" * 9]
IDS = {"return_token_ids": True}


def generated(world: World, prompt: str, tokens: int, adapter: str | None = None) -> list[int]:
    """Greedy tokens from transformers itself, with PEFT's own layers for an adapter."""
    model = AutoModelForCausalLM.from_pretrained(world.model)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, world.adapters[adapter])
    ids = torch.tensor([TOKENIZER(prompt).input_ids])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return output[0, ids.shape[1] :].tolist()


def load(engine: Running, world: World) -> None:
    """All adapters; loading again under the same name and path changes nothing."""
    for name, path in world.adapters.items():
        engine.client.post(
            "/load_lora_adapter", body={"lora_name": name, "lora_path": str(path)}, cast_to=dict[str, object]
        )


async def complete(engine: Running, prompt: Any, model: str = "base", **parameters: Any) -> Any:
    extra = {**IDS, **parameters.pop("extra", {})}
    async with engine.aclient as client:
        answer = await client.completions.create(model=model, prompt=prompt, extra_body=extra, **parameters)
        return [chunk async for chunk in answer] if parameters.get("stream") else answer


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
async def test_greedy_is_generate(engine: Running, world: World, prompt: str) -> None:
    answer = await complete(engine, prompt, temperature=0, max_tokens=40)
    expected = generated(world, prompt, 40)
    assert answer.choices[0].token_ids == expected
    assert answer.prompt_token_ids == TOKENIZER(prompt).input_ids
    assert answer.usage.completion_tokens == len(expected)
    assert answer.choices[0].finish_reason == ("stop" if expected[-1] == TOKENIZER.eos_token_id else "length")
    assert answer.choices[0].text == TOKENIZER.decode(expected, skip_special_tokens=True)


MIXED: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 30},
    {"temperature": 1, "seed": 1, "max_tokens": 25},
    {"temperature": 0.5, "seed": 2, "max_tokens": 35, "top_p": 0.8},
    {"temperature": 1.5, "seed": 3, "max_tokens": 20, "extra": {"top_k": 5}},
    {"temperature": 1, "seed": 4, "max_tokens": 30, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1, "seed": 5, "max_tokens": 30, "n": 3, "extra": {"repetition_penalty": 1.2}},
    {"temperature": 0, "max_tokens": 30, "logit_bias": {"300": 4}, "extra": {"min_tokens": 10}},
]


async def test_a_batch_of_mixed_requests_is_each_alone(engine: Running, world: World) -> None:
    load(engine, world)
    models = ["base", *world.adapters]
    asks = [
        (prompt, models[(i + j) % 4], parameters)
        for i, prompt in enumerate(PROMPTS)
        for j, parameters in enumerate(MIXED)
    ]
    alone = [await complete(engine, prompt, model, **parameters) for prompt, model, parameters in asks]
    together = await asyncio.gather(
        *(complete(engine, prompt, model, **parameters) for prompt, model, parameters in asks)
    )
    for one, other in zip(alone, together, strict=True):
        assert [choice.token_ids for choice in one.choices] == [choice.token_ids for choice in other.choices]
        assert [choice.text for choice in one.choices] == [choice.text for choice in other.choices]


async def test_adapters_in_one_batch_equal_their_references(engine: Running, world: World) -> None:
    load(engine, world)
    names = [None, *world.adapters]
    asks = [(prompt, name) for prompt in PROMPTS[:3] for name in names]
    answers = await asyncio.gather(
        *(complete(engine, prompt, name or "base", temperature=0, max_tokens=24) for prompt, name in asks)
    )
    outputs = []
    for (prompt, name), answer in zip(asks, answers, strict=True):
        assert answer.model == (name or "base")
        outputs.append(tuple(answer.choices[0].token_ids))
        assert list(outputs[-1]) == generated(world, prompt, 24, name), (prompt, name)
    assert len(set(outputs)) == len(asks), "the adapters must make a difference for this test to say anything"


async def test_a_seed_fixes_the_text_and_choices_differ(engine: Running) -> None:
    first, again, other, unseeded, unseeded2 = await asyncio.gather(
        complete(engine, "the", n=4, seed=11, max_tokens=20),
        complete(engine, "the", n=4, seed=11, max_tokens=20),
        complete(engine, "the", n=4, seed=12, max_tokens=20),
        complete(engine, "the", max_tokens=20),
        complete(engine, "the", max_tokens=20),
    )
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert texts != [choice.text for choice in other.choices]
    assert len(set(texts)) == 4
    assert unseeded.choices[0].text != unseeded2.choices[0].text
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]


async def test_several_prompts_give_choices_in_order(engine: Running) -> None:
    ids = TOKENIZER("quick").input_ids
    answer = await complete(engine, [PROMPTS[0], PROMPTS[3]], n=2, temperature=0, max_tokens=8)
    by_ids = await complete(engine, [TOKENIZER(PROMPTS[0]).input_ids, ids], temperature=0, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text == by_ids.choices[0].text != answer.choices[2].text
    assert by_ids.prompt_token_ids == [TOKENIZER(PROMPTS[0]).input_ids, ids]
    assert by_ids.usage.prompt_tokens == len(TOKENIZER(PROMPTS[0]).input_ids) + len(ids)


async def test_defaults_of_max_tokens(engine: Running) -> None:
    assert (await complete(engine, "the", extra={"ignore_eos": True})).usage.completion_tokens == 16
    async with engine.aclient as client:
        chat = await client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], extra_body={"ignore_eos": True}
        )
    assert chat.usage.total_tokens == 512
    assert chat.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_end_and_are_not_shown(engine: Running, stream: bool) -> None:
    full = (await complete(engine, "the lazy", seed=5, max_tokens=60, extra={"ignore_eos": True})).choices[0]
    stop = full.text[20:24]
    parameters = {"seed": 5, "max_tokens": 60, "stop": [stop, "never there"], "stream": stream}
    answer = await complete(engine, "the lazy", extra={"ignore_eos": True}, **parameters)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text, finish = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
        tokens = [token for chunk in chunks for token in chunk.token_ids]
    else:
        text, finish, tokens = answer.choices[0].text, answer.choices[0].finish_reason, answer.choices[0].token_ids
    assert text == full.text[: full.text.index(stop)]
    assert finish == "stop"
    assert tokens == full.token_ids[: len(tokens)]
    assert stop in TOKENIZER.decode(tokens, skip_special_tokens=True)


async def test_stop_token_ids_min_tokens_and_ignore_eos(engine: Running) -> None:
    free = (await complete(engine, "x", seed=8, max_tokens=30, extra={"ignore_eos": True})).choices[0]
    token = free.token_ids[4]
    first = free.token_ids.index(token)
    ended = (
        await complete(engine, "x", seed=8, max_tokens=30, extra={"stop_token_ids": [token], "ignore_eos": True})
    ).choices[0]
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.finish_reason == "stop"
    later = {"stop_token_ids": [token], "ignore_eos": True, "min_tokens": first + 3}
    forced = (await complete(engine, "x", seed=8, max_tokens=30, extra=later)).choices[0]
    assert len(forced.token_ids) >= first + 3
    assert token not in forced.token_ids[: first + 3]


@pytest.mark.parametrize("temperature", [0, 0.7, 1])
async def test_logprobs_are_those_of_a_plain_forward(engine: Running, world: World, temperature: float) -> None:
    parameters = {"temperature": temperature, "seed": 3, "max_tokens": 12, "extra": {"top_k": 3}}
    answer = await complete(engine, "over the", logprobs=2, **parameters)
    choice, prompt = answer.choices[0], answer.prompt_token_ids
    model = AutoModelForCausalLM.from_pretrained(world.model)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + choice.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = (logits / (temperature or 1)).log_softmax(-1)
    assert expected.exp().sum(-1) == pytest.approx(1, abs=1e-4)
    sampled = expected.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]
    assert choice.logprobs.token_logprobs == pytest.approx(sampled.tolist(), abs=1e-4)
    for shown, row in zip(choice.logprobs.top_logprobs, expected, strict=True):
        best = sorted(shown.values(), reverse=True)[:2]
        assert best == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    offsets = choice.logprobs.text_offset
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(choice.text)


async def test_chat_logprobs_and_stream_agree_with_the_whole(engine: Running) -> None:
    ask: dict[str, Any] = {
        "model": "base",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "你好"}]},
        ],
        "max_completion_tokens": 30,
        "seed": 4,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "extra_body": IDS,
    }
    async with engine.aclient as client:
        whole = await client.chat.completions.create(**ask)
        stream = await client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert all(part.delta.role is None for part in parts[1:])
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content]
        for entry, mine in zip(choice.logprobs.content, entries, strict=True):
            assert entry.logprob == pytest.approx(mine.logprob, abs=1e-4)
            assert len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].logprob >= entry.logprob - 1e-6
        assert [t for part in parts[1:] for t in part.token_ids] == choice.token_ids
        raw = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert raw.decode(errors="replace").removesuffix("<|im_end|>").replace("\ufffd", "")[:5]


async def test_streams_never_cut_a_character(engine: Running) -> None:
    """Biased to bytes of 你 and 🙂, so that most characters take several tokens."""
    letters = [token for text in ("你", "好", "🙂", "é") for token in TOKENIZER(text).input_ids]
    ask: dict[str, Any] = {
        "max_tokens": 80,
        "seed": 1,
        "logit_bias": {str(token): 40 for token in letters},
        "extra": {"ignore_eos": True},
    }
    whole = (await complete(engine, "x", **ask)).choices[0].text
    chunks = [chunk.choices[0].text for chunk in await complete(engine, "x", stream=True, **ask)]
    assert "".join(chunks) == whole
    assert len(chunks) > 5


async def test_a_long_prompt_enters_in_chunks(world: World, tight: Running) -> None:
    prompt = "héllo zebra 42 " * 12
    answers = await asyncio.gather(
        complete(tight, prompt, temperature=0, max_tokens=20), complete(tight, "the", temperature=0, max_tokens=40)
    )
    assert len(answers[0].prompt_token_ids) > 100
    assert answers[0].choices[0].token_ids == generated(world, prompt, 20)
    assert answers[1].choices[0].token_ids == generated(world, "the", 40)


async def test_a_full_cache_sends_sequences_back_and_changes_nothing(tight: Running, engine: Running) -> None:
    """Room for 4 rows of up to 127 tokens; 8 sequences of up to 180: they leave and enter again."""
    parameters: dict[str, Any] = {"max_tokens": 180, "presence_penalty": 0.5, "extra": {"ignore_eos": True}}
    squeezed, roomy = [
        await asyncio.gather(*(complete(where, "the", seed=i, **parameters) for i in range(8)))
        for where in (tight, engine)
    ]
    assert [one.choices[0].token_ids for one in squeezed] == [one.choices[0].token_ids for one in roomy]
    with pytest.raises(openai.BadRequestError) as refused:
        await complete(tight, "the", max_tokens=511)
    assert refused.value.code == "context_length_exceeded"


def test_strict_validation_passes(engine: Running) -> None:
    client = openai.OpenAI(
        base_url=f"{engine.url}/v1", api_key=engine.token, _strict_response_validation=True, max_retries=0
    )
    chat = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "x"}], max_tokens=5, logprobs=True, top_logprobs=1
    )
    assert chat.object == "chat.completion" and chat.choices[0].message.role == "assistant"
    assert client.completions.create(model="base", prompt="x", logprobs=1).object == "text_completion"
    for _ in client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "x"}], max_tokens=5, stream=True
    ):
        pass
    assert next(model.id for model in client.models.list()) == "base"
