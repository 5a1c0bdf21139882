"""What the engine process does: load a model, serve it, say where, until SIGTERM."""

import asyncio
import contextlib
import gc
import logging
import signal
import sys

import msgspec
import torch
from aiohttp import web
from transformers.utils import logging as transformers_logging

from arbor_core import ArborError
from arbor_core.engine import EngineSpec, announce, read_spec

from . import Options
from .api.app import HttpApi
from .api.service import Service
from .generation.loop import GenerationLoop
from .generation.sequence import Delta, Sink
from .model.loading import Loaded, load, make_batch, mark_progress
from .model.lora import AdapterRows

UNUSABLE_MODEL = 3
LOST_DEVICE = 4
GOODBYE_SECONDS = 3.0


def main() -> int:
    """Serve until SIGTERM; the exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    spec = read_spec(sys.argv[1])
    options = msgspec.convert(spec.options, Options)
    torch.set_num_threads(max(1, spec.threads))
    try:
        loaded = load(spec.path, spec.devices[0], options)
        return asyncio.run(serve(spec, options, loaded))
    except ArborError as error:
        print(error, file=sys.stderr)
        return UNUSABLE_MODEL


async def serve(spec: EngineSpec, options: Options, loaded: Loaded) -> int:
    """Listen until SIGTERM or until the device is lost; the exit status."""
    loop, ending, status = asyncio.get_running_loop(), asyncio.Event(), 0

    def broken() -> None:
        nonlocal status
        status = LOST_DEVICE
        loop.call_soon_threadsafe(ending.set)

    def deliver(deltas: list[tuple[Sink, Delta]]) -> None:
        # The loop is closed only after the last generation has been failed; nobody is left to read then.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(put_all, deltas)

    lora = AdapterRows(loaded.model)
    batch, context = make_batch(loaded, lora, options)
    generation = GenerationLoop(
        batch, options.max_batch, options.max_waiting, options.prefill_tokens, deliver, broken, spec.version
    )
    mark_progress(loaded.model, generation.progress)
    service = Service(spec.model, loaded, generation, lora, context, options.max_unread)
    generation.start()
    runner = web.AppRunner(
        HttpApi(service, spec).app(), access_log=None, handler_cancellation=True, shutdown_timeout=GOODBYE_SECONDS
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    gc.collect()
    gc.freeze()  # the libraries and the model stay: looking through them again would hold up every sequence
    announce(spec, runner.addresses[0][1])
    await ending.wait()
    await site.stop()
    generation.stop()
    await runner.cleanup()
    await asyncio.to_thread(generation.thread.join, GOODBYE_SECONDS)
    return status


def put_all(deltas: list[tuple[Sink, Delta]]) -> None:
    for sink, delta in deltas:
        sink.put(delta)
