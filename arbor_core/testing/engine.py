"""`check_backend` and `check_policies`: what the server relies on when it starts an engine, relays requests to it, and
brings policies into it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arbor_core.jobdir.documents import import_object
from arbor_core.types import (
    ArborError,
    Engine,
    EngineNeeds,
    EngineSpec,
    InferenceBackend,
    Sender,
    UnknownModelError,
    Weights,
)

from .hardware import device

if TYPE_CHECKING:
    import aiohttp

TOKEN = "a-token-of-the-check"  # noqa: S105 - not a secret
WAIT_SECONDS = 120.0
HEALTH_SECONDS = 10.0


def check_backend(
    factory: Callable[[], InferenceBackend], model: str | Path, *, options: Mapping[str, Any], refuses: bool = True
) -> None:
    """Start an engine, talk to it, stop it.

    Args:
        factory: As the plugin's hook returns it.
        model: Directory of a base model that it can serve.
        options: The backend's options, as in its `conf/backend/<name>.yaml`.
        refuses: Whether a directory that holds no model must be refused (a simulated engine takes any).

    Raises:
        AssertionError: what was expected.
    """
    asyncio.run(_check_backend(factory, str(model), options, refuses))


async def _check_backend(
    factory: Callable[[], InferenceBackend], model: str, options: Mapping[str, Any], refuses: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if refuses:
            await _check_refusal(factory, _spec(root / "refused", str(root / "no-model"), options))
        _check_needs(factory().needs(model, options, (device(),)))
        await factory().find(model)
        engine = await factory().start(_spec(root / "engine", model, options))
        try:
            await _check_api(engine)
        finally:
            await engine.stop()
        async with asyncio.timeout(WAIT_SECONDS):
            said = await engine.wait()
        assert said, "wait() does not say how the engine ended"
        assert not await engine.health(), "a stopped engine is said to be healthy"
        assert await engine.stalled_for(HEALTH_SECONDS) is None, "a stopped engine is said to answer"
        await _check_killed(await factory().start(_spec(root / "killed", model, options)))


def check_policies(
    factory: Callable[[], InferenceBackend],
    model: str | Path,
    write: Callable[[Path], None],
    *,
    options: Mapping[str, Any],
) -> None:
    """Bring adapters into an engine as a trainer of two ranks does: by the backend's sender, or as files.

    Args:
        write: Writes a PEFT adapter for the model into a directory.

    Raises:
        AssertionError: what was expected.
    """
    asyncio.run(_check_policies(factory, str(model), write, options))


class _Rank:
    """What a sender sees of its run."""

    def __init__(self, root: Path, rank: int) -> None:
        self.job_id, self.rank, self.world_size = "ftjob-check", rank, 2
        self.dir, self.work = root, root / "work"
        self.work.mkdir(exist_ok=True)


class _Policy:
    """Weights that rank 0 can write alone."""

    module = None

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._write = write

    def write(self, folder: Path | None) -> None:
        if folder:
            self._write(folder)


async def _check_policies(
    factory: Callable[[], InferenceBackend], model: str, write: Callable[[Path], None], options: Mapping[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first, second = _policies(factory(), root, write)
        engine = await factory().start(_spec(root / "engine", model, options))
        try:
            await engine.load_weights(first)
            await engine.load_weights(second)
            nowhere = Weights("nowhere", str(root / "nowhere"), None if first.sent is None else {})
            try:
                await engine.load_weights(nowhere)
            except ArborError:
                pass
            else:
                raise AssertionError("an adapter was loaded from where there is none")
            await engine.unload(first.name)
            await _check_loaded(engine, present=second.name, absent=first.name)
        finally:
            await engine.stop()


def _policies(backend: InferenceBackend, root: Path, write: Callable[[Path], None]) -> list[Weights]:
    """Two versions, sent by two ranks."""
    name: str = getattr(backend, "sender", "")
    ranks: list[Any] = [_Rank(root, rank) for rank in (0, 1)]
    senders: list[Sender] = [import_object(name)(rank) for rank in ranks] if name else []
    found = []
    for version in (1, 2):
        with ThreadPoolExecutor(len(ranks)) as pool:  # together, as ranks do
            sent = list(pool.map(lambda sender: sender.send(version, _Policy(write)), senders))  # noqa: B023
        folder = root / f"{version}-1"
        if not senders:
            folder.mkdir()
            write(folder)
        found.append(Weights(f"job-s{version}", "" if senders else str(folder), dict(sent[0]) if senders else None))
    return found


async def _check_loaded(engine: Engine, *, present: str, absent: str) -> None:
    """One adapter answers, and one that was unloaded does not."""
    import aiohttp

    body = {"messages": [{"role": "user", "content": "Say something short."}], "max_tokens": 4}
    async with aiohttp.ClientSession(headers=engine.headers) as session:
        async with session.get(f"{engine.url}/v1/models") as answer:
            names = [entry["id"] for entry in (await answer.json())["data"]]
        assert present in names, f"{present} was loaded, and the engine has {names}"
        assert absent not in names, f"{absent} was unloaded, and the engine has {names}"
        for name, expected in ((present, 200), (absent, 404)):
            async with session.post(f"{engine.url}/v1/chat/completions", json={**body, "model": name}) as answer:
                assert answer.status == expected, f"a completion of {name} answered {answer.status}, not {expected}"


def _check_needs(said: EngineNeeds) -> None:
    """An engine takes a device at least, or a share of one."""
    assert min(said.devices, said.adapters, said.replicas) >= 1, f"an engine needs what cannot be: {said}"
    assert 0 < said.share <= 1, f"an engine takes a share of {said.share} of a device, expected more than 0 and up to 1"


def _spec(folder: Path, model: str, options: Mapping[str, Any]) -> EngineSpec:
    return EngineSpec("base", model, folder, (device(),), 1, TOKEN, dict(options))


async def _check_refusal(factory: Callable[[], InferenceBackend], spec: EngineSpec) -> None:
    try:
        await factory().find(spec.path)
    except UnknownModelError:
        pass
    else:
        raise AssertionError(f"a model was found in {spec.path}, where there is nothing")
    said = None
    try:
        engine = await factory().start(spec)
        await engine.stop()
    except ArborError as error:
        said = str(error)
    assert said is not None, f"an engine of {spec.path}, where there is nothing, was started"
    assert said, "an engine that does not start gives no reason"


async def _check_api(engine: Engine) -> None:
    import aiohttp

    assert await engine.health(), "an engine that has started is not healthy"
    stalled = await engine.stalled_for(HEALTH_SECONDS)
    assert stalled is not None, "an engine that has started does not answer"
    assert stalled < 1, f"an engine without work is said to have been stuck for {stalled} s"
    async with aiohttp.ClientSession() as anybody, anybody.get(f"{engine.url}/v1/models") as answer:
        assert answer.status == 401, f"without the token /v1/models answered {answer.status}, expected 401"
    async with aiohttp.ClientSession(headers=engine.headers) as session:
        await _check_chat(session, engine.url)
        await _check_unknown(session, engine.url)


async def _check_killed(engine: Engine) -> None:
    """One that is deaf to all else ends at once."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await engine.kill()
            assert await engine.wait(), "wait() does not say how a killed engine ended"
    finally:
        await engine.stop()
    assert not await engine.health(), "a killed engine is said to be healthy"


async def _check_chat(session: aiohttp.ClientSession, url: str) -> None:
    """One answer, plain and streamed: the same at temperature 0, in OpenAI's shape."""
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "Say something short."}],
        "temperature": 0,
        "max_tokens": 4,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, f"a chat completion answered {answer.status}: {await answer.text()}"
        plain = await answer.json()
    missing = {"id", "object", "created", "model", "choices", "usage"} - set(plain)
    assert not missing, f"a chat completion lacks {sorted(missing)}"
    async with session.post(f"{url}/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = [line async for line in answer.content if line.strip()]
    assert lines[-1].strip() == b"data: [DONE]", f"a stream ended with {lines[-1]!r}"
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    whole = plain["choices"][0]["message"]["content"]
    assert text == whole, f"streamed, the answer is {text!r}; at once, {whole!r}"


async def _check_unknown(session: aiohttp.ClientSession, url: str) -> None:
    body = {"model": "nobody-loaded-this", "messages": [{"role": "user", "content": "Hello"}]}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 404, f"a model that is not loaded answered {answer.status}, expected 404"
        error = (await answer.json())["error"]
        assert error["code"] == "model_not_found", f"a model that is not loaded: code {error['code']!r}"
