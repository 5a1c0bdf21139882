"""What must not hurt anybody else: clients that leave or dawdle, full queues, poisoned adapters, shutdown."""

import asyncio
import contextlib
import json
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from embedded import Running, World, launch, make_adapter, start
from waiting import until_async

LONG = {"model": "base", "prompt": "the", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine with room for two rows, two waiting sequences, and 16 unread deltas."""
    running = start(world.model, tmp_path_factory.mktemp("narrow"), max_batch=2, max_waiting=2, max_unread=16)
    yield running
    running.stop()


async def health(engine: Running) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{engine.url}/health") as answer:
        return dict(await answer.json())


def idle(engine: Running) -> Any:
    async def check() -> bool:
        now = await health(engine)
        return now["running"] == now["waiting"] == 0

    return check


def busy(engine: Running, running: int, waiting: int = 0) -> Any:
    async def check() -> bool:
        now = await health(engine)
        return (now["running"], now["waiting"]) == (running, waiting)

    return check


def session_of(engine: Running) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"authorization": f"Bearer {engine.token}"})


@pytest.mark.parametrize("stream", [True, False], ids=["row-127", "row-128"])
async def test_a_client_that_leaves_frees_its_rows(narrow: Running, stream: bool) -> None:
    session = session_of(narrow)
    request = asyncio.create_task(
        session.post(f"{narrow.url}/v1/completions", json={**LONG, "n": 4, "logprobs": 5, "stream": stream})
    )
    await until_async(busy(narrow, 2, 2))
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await session.close()
    await until_async(idle(narrow), 2.0)  # all of it would take longer


async def test_row_135_a_full_queue_refuses(narrow: Running) -> None:
    async with session_of(narrow) as session:
        first = asyncio.create_task(session.post(f"{narrow.url}/v1/completions", json={**LONG, "n": 4}))
        await until_async(busy(narrow, 2, 2))
        with pytest.raises(openai.RateLimitError) as error:
            await narrow.aclient.completions.create(model="base", prompt="x")
        assert error.value.code == "rate_limit_exceeded"
        assert error.value.response.headers["retry-after"] == "1"
        answer = await (await first).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4
    await until_async(idle(narrow))


async def test_row_129_a_slow_reader_is_cut_off(narrow: Running) -> None:
    """The client asks for much and reads nothing, with a receive buffer that holds little."""
    loop = asyncio.get_running_loop()
    host, port = narrow.url.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": "base",
            "messages": [{"role": "user", "content": "x"}],
            "ignore_eos": True,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
            "n": 2,
        }
    ).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        "Authorization: Bearer secret",
        f"Content-Length: {len(body)}",
    ]
    head = "\r\n".join([*lines, "", ""])
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, head.encode() + body)
        log = narrow.dir / "engine.log"

        async def cut() -> bool:
            return "reads too slowly" in log.read_text()

        await until_async(cut)
        await until_async(idle(narrow))
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := await loop.sock_recv(client, 1 << 20):
                received += part
    assert b"[DONE]" not in received


async def test_a_poisoned_adapter_fails_only_its_own_requests(narrow: Running, world: World, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    poison = make_adapter(world.model, tmp_path / "poison", 1, r=2, target_modules=["o_proj"])
    tensors = load_file(poison / "adapter_model.safetensors")
    save_file({key: value * 1e30 for key, value in tensors.items()}, poison / "adapter_model.safetensors")
    async with session_of(narrow) as session:
        load = {"lora_name": "poison", "lora_path": str(poison)}
        assert (await session.post(f"{narrow.url}/v1/load_lora_adapter", json=load)).status == 200
        ask = {"model": "base", "prompt": "the", "seed": 1, "max_tokens": 60, "ignore_eos": True}
        alone = await (await session.post(f"{narrow.url}/v1/completions", json=ask)).json()
        good = asyncio.create_task(session.post(f"{narrow.url}/v1/completions", json=ask))
        for _ in range(5):
            bad = await session.post(f"{narrow.url}/v1/completions", json={"model": "poison", "prompt": "the"})
            assert bad.status == 500
            assert (await bad.json())["error"]["code"] == "engine_numerical_error"
            assert bad.headers["x-should-retry"] == "false"
        assert (await (await good).json())["choices"][0]["text"] == alone["choices"][0]["text"]
        await session.post(f"{narrow.url}/v1/unload_lora_adapter", json={"lora_name": "poison"})
    await until_async(idle(narrow))


async def test_an_error_in_a_stream_comes_in_band(narrow: Running, world: World, tmp_path: Path) -> None:
    """The first tokens are fine: the poison sits in a layer that only an adapter loaded for this request has."""
    with pytest.raises(openai.NotFoundError):
        await narrow.aclient.completions.create(model="gone", prompt="x", stream=True)
    poison = make_adapter(world.model, tmp_path / "p", 1, r=2, target_modules=["o_proj"])
    from safetensors.torch import load_file, save_file

    tensors = load_file(poison / "adapter_model.safetensors")
    save_file({key: value * 1e30 for key, value in tensors.items()}, poison / "adapter_model.safetensors")
    async with session_of(narrow) as session:
        await session.post(f"{narrow.url}/v1/load_lora_adapter", json={"lora_name": "p", "lora_path": str(poison)})
        answer = await session.post(f"{narrow.url}/v1/completions", json={"model": "p", "prompt": "x", "stream": True})
        frames = (await answer.text()).strip().split("\n\n")
    assert json.loads(frames[0].removeprefix("data: "))["error"]["code"] == "engine_numerical_error"
    assert frames[-1] == "data: [DONE]"


async def test_adapters_come_and_go_under_traffic(engine: Running, world: World) -> None:
    """A request that runs on an adapter finishes on it though it is unloaded meanwhile; a new one is a 404."""
    async with session_of(engine) as session:

        async def ask(model: str) -> dict[str, Any]:
            body = {"model": model, "prompt": "quick", "temperature": 0, "max_tokens": 200, "ignore_eos": True}
            answer = await session.post(f"{engine.url}/v1/completions", json=body)
            assert answer.status == 200, await answer.text()
            return dict(await answer.json())

        async def load(name: str, adapter: str) -> None:
            body = {"lora_name": name, "lora_path": str(world.adapters[adapter])}
            assert (await session.post(f"{engine.url}/v1/load_lora_adapter", json=body)).status == 200

        async def unload(name: str) -> None:
            assert (await session.post(f"{engine.url}/v1/unload_lora_adapter", json={"lora_name": name})).status == 200

        await load("v-small", "small")
        await load("v-large", "large")
        expected = {name: (await ask(name))["choices"][0]["text"] for name in ("base", "v-small", "v-large")}
        await unload("v-small")
        await unload("v-large")
        for turn in range(4):
            adapter = ("small", "large")[turn % 2]
            name = f"v{turn}"
            await load(name, adapter)
            running = [asyncio.create_task(ask(model)) for model in ("base", name, name)]
            await until_async(busy(engine, 3))
            await unload(name)
            gone = await session.post(f"{engine.url}/v1/completions", json={"model": name, "prompt": "x"})
            assert gone.status == 404
            texts = [(await one)["choices"][0]["text"] for one in running]
            assert texts == [expected["base"], expected[f"v-{adapter}"], expected[f"v-{adapter}"]]
        assert not [name for name in (await health(engine))["adapters"] if name.startswith("v")]


async def test_many_clients_that_come_and_go(engine: Running) -> None:
    """Some read to the end, some leave early; afterwards nothing runs, and the survivors' texts are right."""
    async with session_of(engine) as session:

        async def ask(i: int) -> str | None:
            body = {"model": "base", "prompt": "the lazy", "seed": i % 5, "max_tokens": 40, "stream": i % 2 == 0}
            async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
                if i % 3 == 0:
                    return None
                raw = await answer.text()
            if i % 2:
                return str(json.loads(raw)["choices"][0]["text"])
            frames = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
            return "".join(frame["choices"][0]["text"] for frame in frames)

        texts = await asyncio.gather(*(ask(i) for i in range(60)))
    by_seed: dict[int, set[str]] = {}
    for i, text in enumerate(texts):
        if text is not None:
            by_seed.setdefault(i % 5, set()).add(text)
    assert all(len(found) == 1 for found in by_seed.values())
    await until_async(idle(engine))


async def test_sigterm_ends_streams_in_band(world: World, tmp_path: Path) -> None:
    running = start(world.model, tmp_path / "term")
    async with session_of(running) as session:
        body = {**LONG, "stream": True, "n": 8}
        answer = await session.post(f"{running.url}/v1/completions", json=body)
        await answer.content.readuntil(b"\n\n")
        running.process.send_signal(signal.SIGTERM)
        rest = (await answer.content.read()).decode()
    frames = rest.strip().split("\n\n")
    assert json.loads(frames[-2].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert frames[-1] == "data: [DONE]"
    assert await asyncio.to_thread(running.process.wait, 120) == 0


async def test_the_process_ends_with_its_parent(world: World, tmp_path: Path) -> None:
    """Standard input ends, at any moment: while it loads, and in the middle of a generation."""
    loading = launch(world.model, tmp_path / "loading")
    assert loading.stdin is not None
    loading.stdin.close()
    assert await asyncio.to_thread(loading.wait, 120) == 0
    running = start(world.model, tmp_path / "running")
    async with session_of(running) as session:
        answer = await session.post(f"{running.url}/v1/completions", json={**LONG, "stream": True, "n": 8})
        await answer.content.readuntil(b"\n\n")
        assert await asyncio.to_thread(running.stop) == 0
