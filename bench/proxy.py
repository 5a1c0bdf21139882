"""What `arbor-serve` adds to a chat completion: the same requests through it and straight to the mock engine.

    python bench/proxy.py [REQUESTS]

Both in one run, one request of each kind after the other, so that a noisy machine disturbs both alike. Sequential
requests over one kept connection show the added latency; 32 and 64 at once, 64 tokens each, the share of the engine's
own throughput that is left. The last line is JSON.
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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

MODEL = "mock/tiny"
TOKENS = 64
CONCURRENT = (32, 64)
ROUNDS = 3
WAVES = 3


def body(stream: bool = False) -> dict[str, Any]:
    words = "a fairly ordinary question of about a dozen words for the model"
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": stream,
    }


async def ask(session: aiohttp.ClientSession, url: str, stream: bool = False) -> float:
    """Seconds that one request takes to its last byte."""
    began = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json=body(stream)) as answer:
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
    """Median completions a second of both, taken in turn."""
    count = concurrent * WAVES
    pairs = [(await rate(through, concurrent, count), await rate(direct, concurrent, count)) for _ in range(ROUNDS)]
    served, own = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    return {"through": round(served, 1), "direct": round(own, 1), "ratio": round(served / own, 3)}


def serve(folder: Path, *overrides: str) -> tuple[subprocess.Popen[bytes], str]:
    """An `arbor-serve` with the mock plugin, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "arbor_core", "serve", "port=0", f"storage={folder}", *overrides],
        stdout=subprocess.PIPE,
        env={**os.environ, "ARBOR_MOCK_GPU": "1", "ARBOR_HOME": str(folder / "home")},
    )
    assert process.stdout is not None
    return process, process.stdout.readline().decode().split()[-1]


def engine_of(storage: Path) -> tuple[str, dict[str, str]]:
    """Address and headers of the engine that the server has started."""
    folder = max((storage / "engines").iterdir())
    token = json.loads((folder / "spec.json").read_bytes())["token"]
    url = json.loads((folder / "ready.json").read_bytes())["url"]
    return url, {"Authorization": f"Bearer {token}"}


async def measure(url: str, storage: Path, requests: int, busy: bool) -> dict[str, Any]:
    """Latency, or throughput where the engine is `busy`.

    A busy engine takes 5 ms a token: one that takes no time at all measures only how three processes share two cores.
    """
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await ask(session, url)
        address, headers = engine_of(storage)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as own:
            results: dict[str, Any] = {}
            for name, stream in (("plain", False), ("stream", True)) if not busy else ():
                results[name] = await latency(
                    lambda stream=stream: ask(session, url, stream),
                    lambda stream=stream: ask(own, address, stream),
                    requests,
                )
            for concurrent in CONCURRENT if busy else ():
                for name, stream in (("plain", False), ("stream", True)):
                    results[f"{name}_{concurrent}"] = await throughput(
                        lambda stream=stream: ask(session, url, stream),
                        lambda stream=stream: ask(own, address, stream),
                        concurrent,
                    )
    return results


def main() -> None:
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in (("idle", ()), ("busy", ("++engine.token_seconds=0.005",))):
            storage = Path(folder) / name
            process, url = serve(storage, *overrides)
            try:
                results |= asyncio.run(measure(url, storage, requests, name == "busy"))
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait()
    for key, value in results.items():
        print(f"{key:10} {value}")
    print(json.dumps({"proxy": results}))


if __name__ == "__main__":
    main()
