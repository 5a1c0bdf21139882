"""`python -m arbor_mock.engine SPEC.json`: the engine process. It ends when its standard input does, and on SIGTERM."""

import asyncio
import signal
import sys
import time

import msgspec
from aiohttp import web

from arbor_core.engine import EngineSpec, announce, end_with_parent, read_spec
from arbor_mock.config import EngineOptions
from arbor_mock.sender import fetch

from .app import STOP_SECONDS, MockEngine

START_FAILED = 3


async def run(spec: EngineSpec, options: EngineOptions) -> None:
    """Serve until SIGTERM."""
    engine = MockEngine(spec, options)
    runner = web.AppRunner(engine.app(), handler_cancellation=True, access_log=None, keepalive_timeout=3600)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024, shutdown_timeout=STOP_SECONDS)
    await site.start()
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    announce(spec, runner.addresses[0][1])
    await terminated.wait()
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
    if spec.sent is not None:
        fetch(spec.sent, spec.dir / "fetched" / "first")
    asyncio.run(run(spec, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
