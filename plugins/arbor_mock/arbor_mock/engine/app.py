"""The simulated engine's routes, and what goes wrong behind them when a prompt asks for it."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from arbor_core import ArborError
from arbor_core.engine import (
    NO_RETRY,
    RETRY_SOON,
    ApiError,
    EngineSpec,
    authorised,
    crash_point,
    envelope,
    health,
    routes,
)
from arbor_mock.config import EngineOptions
from arbor_mock.sender import fetch

from .model import Answer, BadFaultError, answer, check_adapter, check_tensors, faults_in
from .wire import Body, ChatBody, ChatWriter, CompletionBody, CompletionWriter, LoadBody, UpdateBody, Writer

FAULT_STATUS = 70
STOP_SECONDS = 2.0


class MockEngine:
    """One simulated model with its adapters.

    Args:
        spec: What to serve.
        options: How, and what is to go wrong.
        weights: What the prompt `[mock: weights=1]` is answered with, where no adapter answers.
    """

    def __init__(self, spec: EngineSpec, options: EngineOptions, weights: str) -> None:
        self.spec, self.options = spec, options
        self.adapters: dict[str, str] = {}
        """The SHA-256 of the tensors of each that is loaded."""
        self.weights = weights
        """The same of the model's own."""
        self.users: dict[str, int] = {}
        self.drained = asyncio.Condition()
        self.places = asyncio.Semaphore(options.max_running)
        self.requests: set[asyncio.Task[Any]] = set()
        self.running = self.waiting = 0
        self.hanging: list[float] = []
        """Since when each request hangs."""
        self.version = spec.version
        self.stopping = False

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guarded], client_max_size=64 << 20)
        app.add_routes([web.route(*route) for route in routes(self)])
        return app

    @web.middleware
    async def guarded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """The token is demanded, and every error has OpenAI's envelope."""
        try:
            if not authorised(self.spec, request.path, request.headers.get("Authorization", "")):
                raise ApiError(401, "The engine's token is missing or wrong.", "invalid_api_key")
            return await handler(request)
        except ApiError as error:
            return refusal(error)
        except msgspec.DecodeError as error:
            return refusal(ApiError(400, str(error), "invalid_value"))
        except web.HTTPException as error:
            return refusal(ApiError(error.status, error.reason, "invalid_request"))

    async def health(self, _: web.Request) -> web.Response:
        stalled = time.monotonic() - min(self.hanging) if self.hanging else 0.0
        running, waiting = self.running, self.waiting
        return json_response(
            health(self.spec, self.adapters, running=running, waiting=waiting, stalled_seconds=stalled)
        )

    async def models(self, _: web.Request) -> web.Response:
        shared = {"object": "model", "created": 0, "owned_by": "arbor-mock"}
        data = [{"id": name, **shared} for name in (self.spec.model, *self.adapters)]
        return json_response({"object": "list", "data": data})

    async def load(self, request: web.Request) -> web.Response:
        """Load an adapter under a name; one of the same name is replaced."""
        given = msgspec.json.decode(await request.read(), type=LoadBody)
        crash_point("adapter.loading")
        await asyncio.sleep(self.options.weights_seconds)
        path = await self.fetched(given.lora_path, given.sent)
        try:
            self.adapters[given.lora_name] = check_adapter(Path(path))
        except (OSError, ValueError) as error:
            raise ApiError(400, f"{path} is no PEFT adapter: {error}", "invalid_adapter", "lora_path") from None
        crash_point("adapter.loaded")
        return json_response({"status": "ok"})

    async def fetched(self, path: str, sent: dict[str, Any] | None) -> str:
        """The directory of weights: what its trainer sent is fetched from it."""
        if sent is None:
            return path
        folder = self.spec.dir / "fetched" / str(sent.get("version"))
        try:
            await asyncio.to_thread(fetch, sent, folder)
        except ArborError as error:
            raise ApiError(400, str(error), "weights_gone", "sent") from None
        crash_point("weights.fetched")
        return str(folder)

    async def unload(self, request: web.Request) -> web.Response:
        """Forget an adapter; returns when the requests that run on it have finished."""
        name = msgspec.json.decode(await request.read(), type=dict[str, str])["lora_name"]
        crash_point("adapter.unloading")
        if self.adapters.pop(name, None) is None:
            raise ApiError(404, f"No adapter '{name}' is loaded.", "model_not_found", "lora_name")
        async with self.drained:
            await self.drained.wait_for(lambda: not self.users.get(name))
        return json_response({"status": "ok"})

    async def update(self, request: web.Request) -> web.Response:
        """Take new weights; requests that run go on, and say which version they began with."""
        given = msgspec.json.decode(await request.read(), type=UpdateBody)
        await asyncio.sleep(self.options.weights_seconds)
        try:
            path = await self.fetched(given.path, given.sent)
            self.weights = check_tensors(Path(path) / "model.safetensors")
        except (OSError, ValueError) as error:
            raise ApiError(400, f"{given.path} holds no weights: {error}", "invalid_weights", "path") from None
        self.version = given.version
        return json_response({"status": "ok"})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=ChatBody)
        return await self.serve(request, body, body.prompts(), ChatWriter)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=CompletionBody)
        return await self.serve(request, body, body.prompts(), CompletionWriter)

    async def serve(
        self, request: web.Request, body: Body, prompts: list[tuple[str, bytes]], shapes: type[Writer]
    ) -> web.StreamResponse:
        """Answer one request, or let go wrong what its prompt asks for."""
        if body.model not in (self.spec.model, *self.adapters):
            raise ApiError(404, f"The model '{body.model}' does not exist", "model_not_found", "model")
        try:
            faults = faults_in(" ".join(text for text, _ in prompts))
        except BadFaultError as error:
            raise ApiError(400, f"[mock: ...]: {error}", "invalid_value") from None
        if faults.get("weights"):
            prompts = [(self.adapters.get(body.model, self.weights), read) for _, read in prompts]
        answers = self.answers(body, prompts, faults.get("logprob"))
        writer = shapes(body, answers, [read for _, read in prompts], body.n or 1)
        if faults.get("full"):
            raise self.full()
        if status := faults.get("status"):
            page = "<html><body><h1>Bad Gateway</h1></body></html>"
            return web.Response(status=int(status), text=page, content_type="text/html")
        async with self.place(body.model):
            writer.version = self.version
            crash_point("completion.begun")
            if faults.get("hang"):
                with self.hang():
                    await asyncio.Event().wait()
            await asyncio.sleep(faults.get("delay_seconds", self.options.delay_seconds))
            pace = Pace(self.options, faults)
            return await (self.stream(request, writer, pace) if body.stream else self.whole(writer, pace))

    def answers(self, body: Body, prompts: list[tuple[str, bytes]], logprob: float | None) -> list[Answer]:
        answers = []
        for text, read in prompts:
            room = self.options.context - len(read)
            most = body.most() or max(room, 1)
            if most > self.options.context:
                message = f"Invalid 'max_tokens': expected at most {self.options.context}, this model's context."
                raise ApiError(400, message, "invalid_value", "max_tokens")
            if most > room or most < 1:
                message = (
                    f"This model's maximum context length is {self.options.context} tokens. However, you requested "
                    f"{len(read) + most} tokens ({len(read)} in the prompt, {most} in the completion)."
                )
                param = "messages" if isinstance(body, ChatBody) else "prompt"
                raise ApiError(400, message, "context_length_exceeded", param)
            wanted = body.sampling(most, logprob)
            answers += [answer(body.model, text, index, wanted) for index in range(body.n or 1)]
        return answers

    def full(self) -> ApiError:
        return ApiError(429, f"{self.waiting} requests are waiting already.", "rate_limit_exceeded", headers=RETRY_SOON)

    @asynccontextmanager
    async def place(self, model: str) -> AsyncIterator[None]:
        """A place among those that run; waits for one, if not too many wait."""
        task = asyncio.current_task()
        assert task is not None
        if self.places.locked() and self.waiting >= self.options.max_waiting:
            raise self.full()
        self.requests.add(task)
        self.users[model] = self.users.get(model, 0) + 1
        self.waiting += 1
        try:
            try:
                await self.places.acquire()
            finally:
                self.waiting -= 1
            self.running += 1
            try:
                yield
            finally:
                self.running -= 1
                self.places.release()
        finally:
            self.requests.discard(task)
            self.users[model] -= 1
            async with self.drained:
                self.drained.notify_all()

    @contextmanager
    def hang(self) -> Iterator[None]:
        """Be an engine whose loop is stuck, though it still answers for its health."""
        since = time.monotonic()
        self.hanging.append(since)
        try:
            yield
        finally:
            self.hanging.remove(since)

    async def whole(self, writer: Writer, pace: "Pace") -> web.Response:
        for count in range(max(len(one.tokens) for one in writer.answers) + 1):
            await pace.at(count)
        return web.Response(body=writer.response(), content_type="application/json")

    async def stream(self, request: web.Request, writer: Writer, pace: "Pace") -> web.StreamResponse:
        """Send the choices side by side, token by token."""
        await pace.at(0)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
        await response.prepare(request)
        try:
            await response.write(writer.first())
            sent = [0] * len(writer.answers)
            for count in range(max(len(one.tokens) for one in writer.answers)):
                await response.write(b"".join(frames(writer, count, sent)))
                crash_point("completion.token")
                await pace.at(count + 1)
            await response.write(writer.last())
        except ApiError as error:
            await response.write(in_band(error))
        except asyncio.CancelledError:
            if not self.stopping:
                raise  # the client went away
            await response.write(in_band(ApiError(503, "The engine is shutting down.", "engine_unavailable")))
        return response

    async def stop(self) -> None:
        """End what runs; streams hear why."""
        self.stopping = True
        for task in list(self.requests):
            task.cancel()
        if self.requests:
            await asyncio.wait(list(self.requests), timeout=STOP_SECONDS)


class Pace:
    """How fast the tokens of one request come, and after how many it goes wrong."""

    def __init__(self, options: EngineOptions, faults: dict[str, float]) -> None:
        self.seconds = faults.get("token_seconds", options.token_seconds)
        self.die = faults.get("die_after_tokens", options.die_after_tokens)
        self.fail = faults.get("fail_after_tokens")

    async def at(self, count: int) -> None:
        """Called when `count` tokens are out."""
        if self.die is not None and count >= self.die:
            print(f"told to die after {self.die:.0f} tokens", file=sys.stderr, flush=True)
            os._exit(FAULT_STATUS)
        if self.fail is not None and count >= self.fail:
            raise ApiError(500, f"Told to fail after {self.fail:.0f} tokens.", "engine_failure", headers=NO_RETRY)
        if count and self.seconds:
            await asyncio.sleep(self.seconds)


def frames(writer: Writer, count: int, sent: list[int]) -> list[bytes]:
    """Token number `count` of every choice that has one, and the end of those whose last it is."""
    result = []
    for index, one in enumerate(writer.answers):
        if count >= len(one.tokens):
            continue
        token = one.tokens[count]
        text = one.text[sent[index] : sent[index] + len(token.text)]  # never a part of a stop string
        sent[index] += len(token.text)
        result.append(writer.piece(index, token, text))
        if count == len(one.tokens) - 1:
            result.append(writer.frame([writer.part(index, "", (), one.finish_reason)]))
    return result


def json_response(body: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def refusal(error: ApiError) -> web.Response:
    headers, kind = error.headers, "application/json"
    return web.Response(body=envelope(error), status=error.status, headers=headers, content_type=kind)


def in_band(error: ApiError) -> bytes:
    """An error in a stream that has begun."""
    return b"data: " + envelope(error) + b"\n\ndata: [DONE]\n\n"
