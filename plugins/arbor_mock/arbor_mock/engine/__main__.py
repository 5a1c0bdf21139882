"""`python -m arbor_mock.engine SPEC.json`: the engine process. It ends when its standard input does, and on SIGTERM."""

import asyncio
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

import msgspec
from aiohttp import web

from arbor_core.engine import EngineSpec, announce, crash_point, end_with_parent, read_spec
from arbor_mock.config import EngineOptions
from arbor_mock.sender import fetch

from .app import STOP_SECONDS, MockEngine

START_FAILED = 3


async def run(spec: EngineSpec, options: EngineOptions, weights: str) -> None:
    """Serve until SIGTERM."""
    engine = MockEngine(spec, options, weights)
    runner = web.AppRunner(engine.app(), handler_cancellation=True, access_log=None, keepalive_timeout=3600)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024, shutdown_timeout=STOP_SECONDS)
    await site.start()
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    announce(spec, runner.addresses[0][1])
    await terminated.wait()
    crash_point("engine.stopping")
    await engine.stop()
    await runner.cleanup()


def main() -> int:
    spec = read_spec(sys.argv[1])
    options = msgspec.convert(spec.options, EngineOptions)
    if options.load_error:
        print(options.load_error, file=sys.stderr)
        return START_FAILED
    end_with_parent()
    time.sleep(options.load_seconds)
    asyncio.run(run(spec, options, first_weights(spec)))
    return 0


def first_weights(spec: EngineSpec) -> str:
    """The SHA-256 of a policy's weights, or what stands for those of a base model, which are not read."""
    folder = Path(spec.path)
    if spec.sent is not None:
        folder = spec.dir / "fetched" / "first"
        fetch(spec.sent, folder)
    file = folder / "model.safetensors"
    return sha256(file.read_bytes()).hexdigest() if spec.version and file.is_file() else "base"


if __name__ == "__main__":
    sys.exit(main())
