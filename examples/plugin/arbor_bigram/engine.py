"""An engine in one screen: `python -m arbor_bigram.engine SPEC.json` answers with the last message."""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from aiohttp import web

from arbor_core.engine import ApiError, announce, authorised, end_with_parent, envelope, health, read_spec, routes


class EchoEngine:
    def __init__(self, spec):
        self.spec, self.adapters = spec, {}

    async def health(self, request):
        return web.json_response(health(self.spec, self.adapters, running=0, waiting=0, stalled_seconds=0.0))

    async def models(self, request):
        return web.json_response({"object": "list", "data": [{"id": n} for n in (self.spec.model, *self.adapters)]})

    async def load(self, request):
        given = await request.json()  # with a sender of one's own `given["sent"]` says what it returned
        if not (Path(given["lora_path"]) / "adapter_config.json").is_file():
            raise ApiError(400, "there is no PEFT adapter", "invalid_adapter", "lora_path")
        self.adapters[given["lora_name"]] = given["lora_path"]
        return web.json_response({})

    async def unload(self, request):
        self.adapters.pop((await request.json())["lora_name"], None)
        return web.json_response({})

    async def update(self, request):
        raise ApiError(400, "this engine takes adapters alone", "unsupported_parameter")

    async def chat(self, request):
        given = await request.json()
        if given["model"] not in (self.spec.model, *self.adapters):
            raise ApiError(404, f"The model '{given['model']}' is not loaded", "model_not_found", "model")
        text = self.spec.options["prefix"] + given["messages"][-1]["content"]
        shared = {"id": "chatcmpl-0", "created": int(time.time()), "model": given["model"]}
        said = {"role": "assistant", "content": text}
        if not given.get("stream"):
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            choice = {"index": 0, "message": said, "finish_reason": "stop", "logprobs": None}
            answer = {**shared, "object": "chat.completion", "choices": [choice], "usage": usage}
            return web.json_response(answer)
        chunk = {"index": 0, "delta": said, "finish_reason": "stop", "logprobs": None}
        event = json.dumps({**shared, "object": "chat.completion.chunk", "choices": [chunk]})
        return web.Response(text=f"data: {event}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    async def completions(self, request):
        raise ApiError(400, "this engine answers conversations alone", "unsupported_parameter")

    @web.middleware
    async def guard(self, request, handler):
        """The server's token is demanded, and every error has OpenAI's envelope."""
        try:
            if not authorised(self.spec, request.path, request.headers.get("Authorization", "")):
                raise ApiError(401, "the token is missing or wrong", "invalid_api_key")
            return await handler(request)
        except ApiError as error:
            return web.Response(status=error.status, body=envelope(error), content_type="application/json")


async def serve(spec):
    engine = EchoEngine(spec)
    app = web.Application(middlewares=[engine.guard])
    app.add_routes([web.route(*route) for route in routes(engine)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    announce(spec, runner.addresses[0][1])  # here the model is loaded
    await ended.wait()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(serve(read_spec(sys.argv[1])))
