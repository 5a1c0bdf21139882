"""What `arbor-serve` adds to a chat completion: the same requests through it and straight to the mock engine.

    python bench/proxy.py [REQUESTS]

Both in one run, one request of each kind after the other, so that a noisy machine disturbs both alike. Sequential
requests over one kept connection show the added latency; 32 and 64 at once, 64 tokens of 5 ms each, the share of the
engine's own throughput that is left. (bench/serving.py does that with real models.) The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

MODEL = "mock/tiny"
TOKENS = 64
CONCURRENT = (32, 64)
ROUNDS = 5
WAVES = 3


def body(model: str, stream: bool) -> dict[str, Any]:
    words = "a fairly ordinary question of about a dozen words for the model"
    return {
        "model": model,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": stream,
    }


async def ask(session: aiohttp.ClientSession, url: str, stream: bool = False, model: str = MODEL) -> float:
    """Seconds that one request takes to its last byte."""
    began = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json=body(model, stream)) as answer:
        raw = await answer.read()
        assert answer.status == 200, raw
    return time.perf_counter() - began


async def latency(
    through: Callable[[], Awaitable[float]], direct: Callable[[], Awaitable[float]], count: int
) -> dict[str, float]:
    """Median milliseconds of both, request by request in turn."""
    for _ in range(20):
        await through()
        await direct()
    pairs = [(await through(), await direct()) for _ in range(count)]
    served, own = (statistics.median(seconds) * 1000 for seconds in zip(*pairs, strict=True))
    return {"through_ms": round(served, 3), "direct_ms": round(own, 3), "added_ms": round(served - own, 3)}


async def rate(request: Callable[[], Awaitable[float]], concurrent: int, count: int) -> float:
    """Completions a second with so many at once."""
    left = iter(range(count))

    async def one_after_the_other() -> None:
        for _ in left:
            await request()

    began = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(concurrent)))
    return count / (time.perf_counter() - began)


async def throughput(
    through: Callable[[], Awaitable[float]], direct: Callable[[], Awaitable[float]], concurrent: int
) -> dict[str, float]:
    """Median completions a second of both, taken in turn, and the median of their ratios."""
    count = concurrent * WAVES
    pairs = [(await rate(through, concurrent, count), await rate(direct, concurrent, count)) for _ in range(ROUNDS)]
    served, own = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return {"through": round(served, 1), "direct": round(own, 1), "ratio": round(ratio, 3)}


@contextmanager
def serving(storage: Path, *overrides: str, mock: bool = True) -> Iterator[str]:
    """The address of an `arbor-serve` of our own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "arbor_core", "serve", "port=0", f"storage={storage}", *overrides],
        stdout=subprocess.PIPE,
        env={**os.environ, "ARBOR_MOCK_GPU": "1" if mock else "", "ARBOR_HOME": str(storage / "home")},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode().split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def engine_of(storage: Path) -> tuple[str, dict[str, str]]:
    """Address and headers of the engine that the server has started."""
    folder = max((storage / "engines").iterdir())
    token = json.loads((folder / "spec.json").read_bytes())["token"]
    url = json.loads((folder / "ready.json").read_bytes())["url"]
    return url, {"Authorization": f"Bearer {token}"}


Asking = Callable[[bool], Callable[[], Awaitable[float]]]


@asynccontextmanager
async def both_ways(url: str, storage: Path, model: str = MODEL) -> AsyncIterator[tuple[Asking, Asking]]:
    """Two ways to ask a model: through the server at `url`, and straight to the engine that it has started."""
    async with AsyncExitStack() as stack:

        async def session(headers: dict[str, str]) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=0)
            return await stack.enter_async_context(aiohttp.ClientSession(connector=connector, headers=headers))

        client = await session({})
        await ask(client, url, model=model)
        address, headers = engine_of(storage)
        direct = await session(headers)
        yield (
            lambda stream: lambda: ask(client, url, stream, model),
            lambda stream: lambda: ask(direct, address, stream, model),
        )


async def latencies(url: str, storage: Path, requests: int) -> dict[str, Any]:
    async with both_ways(url, storage) as (through, direct):
        return {
            name: await latency(through(stream), direct(stream), requests)
            for name, stream in (("plain", False), ("stream", True))
        }


async def throughputs(url: str, storage: Path, model: str = MODEL) -> dict[str, Any]:
    async with both_ways(url, storage, model) as (through, direct):
        return {
            f"{name}_{concurrent}": await throughput(through(stream), direct(stream), concurrent)
            for concurrent in CONCURRENT
            for name, stream in (("plain", False), ("stream", True))
        }


def main() -> None:
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder) / "idle"
        with serving(storage) as url:
            results = asyncio.run(latencies(url, storage, requests))
        storage = Path(folder) / "busy"  # an engine that takes no time shows only how three processes share two cores
        with serving(storage, "+engine.token_seconds=0.005") as url:
            results |= asyncio.run(throughputs(url, storage))
    for key, value in results.items():
        print(f"{key:10} {value}")
    print(json.dumps({"proxy": results}))


if __name__ == "__main__":
    main()
