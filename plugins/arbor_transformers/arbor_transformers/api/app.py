"""The engine over HTTP: OpenAI's routes, vLLM's two for adapters, and one for new weights."""

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from arbor_core.engine import ApiError, EngineSpec, authorised, envelope, health, routes
from arbor_transformers.errors import stopping
from arbor_transformers.generation.sequence import Delta, Generation

from .checks import check
from .delta_queue import DeltaQueue
from .requests import ChatRequest, CompletionRequest, LoadAdapter, UnloadAdapter, UpdateWeights, parse
from .responses import Answer
from .service import Service

log = logging.getLogger(__name__)
LARGEST_BODY = 64 << 20
PING_SECONDS = 15.0
CLIENT_LEFT = 499
SEND_BUFFER = 1 << 16
"""Bytes that the kernel may hold for one connection: it would take megabytes, which a slow reader then keeps."""
Route = Callable[[web.Request], Awaitable[web.StreamResponse]]
encode = msgspec.json.Encoder().encode


class HttpApi:
    """The routes over one service.

    Args:
        service: What they serve.
        spec: Of the engine: the model's name, and the token that all routes but /health demand.
    """

    def __init__(self, service: Service, spec: EngineSpec) -> None:
        self.service, self.spec = service, spec
        self.since = int(time.time())

    def app(self) -> web.Application:
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[self._envelope])
        app.add_routes([web.route(*route) for route in routes(self)])
        return app

    async def health(self, request: web.Request) -> web.Response:
        loop, adapters = self.service.loop, sorted(self.service.adapters)
        stalled = loop.progress.stalled_seconds
        numbers = health(self.spec, adapters, running=loop.running, waiting=loop.waiting, stalled_seconds=stalled)
        return answer(numbers)

    async def models(self, request: web.Request) -> web.Response:
        names = [self.service.name, *self.service.adapters]
        data = [{"id": name, "object": "model", "created": self.since, "owned_by": "arbor"} for name in names]
        return answer({"object": "list", "data": data})

    async def load(self, request: web.Request) -> web.Response:
        ask = parse(await request.read(), LoadAdapter)
        # Shielded: a client that leaves must not leave an adapter half attached.
        await asyncio.shield(self.service.load(ask.lora_name, ask.lora_path))
        return answer({"status": "loaded", "lora_name": ask.lora_name})

    async def unload(self, request: web.Request) -> web.Response:
        ask = parse(await request.read(), UnloadAdapter)
        self.service.unload(ask.lora_name)
        return answer({"status": "unloaded", "lora_name": ask.lora_name})

    async def update(self, request: web.Request) -> web.Response:
        ask = parse(await request.read(), UpdateWeights)
        await asyncio.shield(self.service.update(ask.path, ask.version))
        return answer({"status": "updated", "version": ask.version})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        ask = parse(await request.read(), ChatRequest)
        check(ask, self.service.loaded.vocabulary)
        return await self._respond(request, bool(ask.stream), *await self.service.chat(ask))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        ask = parse(await request.read(), CompletionRequest)
        check(ask, self.service.loaded.vocabulary)
        return await self._respond(request, bool(ask.stream), *await self.service.completions(ask))

    async def _respond(
        self, request: web.Request, streams: bool, writing: Answer, generations: Sequence[Generation], queue: DeltaQueue
    ) -> web.StreamResponse:
        """Run generations for as long as their client is there: aiohttp cancels this call when it leaves."""
        self.service.loop.submit(generations)
        try:
            if streams:
                return await self._stream(request, writing, len(generations), queue)
            return answer(writing.complete(await whole(queue, len(generations))))
        finally:
            self.service.loop.cancel(generations)

    async def _stream(self, request: web.Request, writing: Answer, count: int, queue: DeltaQueue) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "content-type": "text/event-stream",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                "x-request-id": request["id"],
            }
        )
        limit_buffers(request)
        await response.prepare(request)
        sending = asyncio.create_task(send(response, writing, count, queue))
        slow = asyncio.create_task(queue.overrun.wait())
        try:
            await asyncio.wait((sending, slow), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                log.warning("a client reads too slowly: its stream is cut")
                if request.transport is not None:
                    request.transport.abort()
                return response
            await sending
        finally:
            sending.cancel()
            slow.cancel()
        return response

    @web.middleware
    async def _envelope(self, request: web.Request, handler: Route) -> web.StreamResponse:
        """Authorisation before anything is read; every failure in OpenAI's envelope."""
        request["id"] = request.headers.get("x-request-id") or uuid.uuid4().hex
        try:
            if not authorised(self.spec, request.path, request.headers.get("authorization", "")):
                raise ApiError(401, "The engine's token is missing or wrong.", "invalid_api_key")
            response = await handler(request)
            if not response.prepared:
                response.headers["x-request-id"] = request["id"]
            return response
        except ApiError as error:
            failure = error
        except web.HTTPException as error:
            code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(
                error.status, "http_error"
            )
            failure = ApiError(error.status, error.reason, code)
        except ConnectionError:
            # The client has left; aiohttp finds out when it tries to send this.
            return web.Response(status=CLIENT_LEFT)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            failure = ApiError(500, "The engine failed; its log has the details.", "engine_error")
        headers = {**failure.headers, "x-request-id": request["id"]}
        body, kind = envelope(failure), "application/json"
        return web.Response(body=body, status=failure.status, headers=headers, content_type=kind)


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=encode(body), status=status, headers=headers, content_type="application/json")


async def whole(queue: DeltaQueue, count: int) -> list[Delta]:
    """The one delta of each of `count` choices, in order; the first error is raised."""
    deltas: list[Delta] = []
    while len(deltas) < count:
        deltas += await queue.take()
        for delta in deltas:
            if delta.error is not None:
                raise delta.error
    return sorted(deltas, key=lambda delta: delta.choice)


async def send(response: web.StreamResponse, writing: Answer, count: int, queue: DeltaQueue) -> None:
    """Write a stream to its end. An error goes into the stream, and ends it like everything else with [DONE]."""
    frames = [event(chunk) for chunk in writing.opening(count)]
    left, failed = count, False
    while left and not failed:
        if frames:
            await response.write(b"".join(frames))
        try:
            async with asyncio.timeout(PING_SECONDS):
                deltas = await queue.take()
        except TimeoutError:
            frames = [b": ping\n\n"]
            continue
        frames = []
        for delta in deltas:
            if delta.error is not None:
                frames.append(frame(envelope(delta.error)))
                failed = True
                break
            left -= delta.finish is not None
            frames.append(event(writing.chunk(delta)))
    ending = None if failed else writing.ending()
    if ending is not None:
        frames.append(event(ending))
    await response.write(b"".join([*frames, b"data: [DONE]\n\n"]))
    await response.write_eof()


def event(body: Any) -> bytes:
    return frame(encode(body))


def frame(raw: bytes) -> bytes:
    return b"data: " + raw + b"\n\n"


def limit_buffers(request: web.Request) -> None:
    """Keep what a slow reader can pile up small."""
    if request.transport is None:
        raise stopping()
    connection = request.transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
