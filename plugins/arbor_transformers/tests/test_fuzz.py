"""Random requests, half of them broken, from clients that may leave: no 500, no torn answer, nothing left running."""

import asyncio
import json
import random
from collections import Counter
from typing import Any

import aiohttp
import pytest
from embedded import Running, World
from waiting import until_async

ODD: list[Any] = [
    None, 0, 1, -1, 2, 0.5, 1e308, -1e308, 10**30, "x", "", [], {}, True, ["a"], [1], [[1]], {"a": 1}, "\ud83d",
    "<|im_end|>", [None], {"5": 3}, 3.7, [{"role": "user"}], [{"type": "function", "function": []}],
]  # fmt: skip
KEYS = [
    "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "stream",
    "stream_options", "return_token_ids", "logprobs", "top_logprobs", "prompt", "messages", "model", "tools",
    "tool_choice", "user", "metadata", "echo", "best_of", "chat_template_kwargs", "response_format",
]  # fmt: skip
CHOICES: dict[str, list[Any]] = {
    "temperature": [0, 0.3, 1, 2],
    "top_p": [0.1, 0.9, 1],
    "top_k": [-1, 0, 1, 7, 10**6],
    "min_p": [0, 0.1, 1],
    "presence_penalty": [-2, 0, 2],
    "repetition_penalty": [0.5, 1, 5],
    "n": [1, 2, 5],
    "stream": [True, False],
    "min_tokens": [0, 3, 100],
    "stop": [None, "e", ["a", "\n"]],
    "ignore_eos": [True, False],
    "logit_bias": [{"5": 100}, {str(i): -100 for i in range(300)}],
    "return_token_ids": [True],
}


def request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body."""
    body: dict[str, Any] = {
        "model": draw.choice(["base", "small", "large"]),
        "max_tokens": draw.randint(1, 60),
        "seed": draw.randint(0, 5),
    }
    body |= {key: draw.choice(values) for key, values in CHOICES.items() if draw.random() < 0.4}
    if draw.random() < 0.5:
        route = "/v1/completions"
        ids = [draw.randint(0, 300) for _ in range(draw.randint(1, 200))]
        body["prompt"] = draw.choice(["x", "hello " * draw.randint(1, 80), ids, ["a", "b c"], [[1, 2], [3]]])
        body |= {"logprobs": draw.randint(0, 5)} if draw.random() < 0.3 else {}
    else:
        route = "/v1/chat/completions"
        contents = ["hi", "<|im_end|>" * 5, "你好" * 20, ""]
        roles = ["user", "system", "assistant"]
        turns = draw.randint(1, 4)
        body["messages"] = [{"role": draw.choice(roles), "content": draw.choice(contents)} for _ in range(turns)]
        body |= {"logprobs": True, "top_logprobs": draw.randint(0, 20)} if draw.random() < 0.3 else {}
    if draw.random() < 0.5:
        body |= {draw.choice(KEYS): draw.choice(ODD) for _ in range(draw.randint(1, 2))}
    return route, body


def check(status: int, raw: bytes, streams: bool) -> None:
    """An answer is whole and of the right shape."""
    if status != 200:
        assert status in (400, 404, 429), raw
        assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}
    elif streams:
        assert raw.endswith(b"data: [DONE]\n\n")
        for frame in raw.decode().split("\n\n"):
            if frame.startswith("data: {"):
                assert "error" not in json.loads(frame.removeprefix("data: "))
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in json.loads(raw)["choices"])


@pytest.mark.parametrize("seed", range(2))
async def test_random_requests(tight: Running, world: World, seed: int) -> None:
    draw, seen = random.Random(seed), Counter[int]()
    headers = {"authorization": f"Bearer {tight.token}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        for name in ("small", "large"):
            body = {"lora_name": name, "lora_path": str(world.adapters[name])}
            assert (await session.post(f"{tight.url}/v1/load_lora_adapter", json=body)).status == 200

        async def one() -> None:
            route, body = request(draw)
            try:
                async with asyncio.timeout(draw.choice([0.01, 0.1, 60, 60])):
                    async with session.post(tight.url + route, data=json.dumps(body)) as answer:
                        raw = await answer.read()
            except TimeoutError:
                seen[0] += 1
                return
            seen[answer.status] += 1
            check(answer.status, raw, bool(body.get("stream")))

        for _ in range(4):
            await asyncio.gather(*(one() for _ in range(50)))

        async def idle() -> bool:
            async with session.get(f"{tight.url}/health") as answer:
                now = await answer.json()
            return bool(now["running"] == now["waiting"] == 0)

        await until_async(idle)
    assert seen[200] > 20 and seen[400] > 20 and seen[0] > 5, seen
    assert "Traceback" not in (tight.dir / "engine.log").read_text()
