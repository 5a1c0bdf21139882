"""`python -m arbor_mock.engine SPEC.json`: the engine process. It ends when its standard input does, and on SIGTERM."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
from aiohttp import web

from arbor_core.engine import PR_SET_PDEATHSIG, EngineSpec, prctl, read_spec, replace
from arbor_mock import EngineOptions

from .app import STOP_SECONDS, MockEngine

START_FAILED = 3


def end_with_parent() -> None:
    """The parent holds the other end of our standard input: when it is gone, in whatever way, so are we."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # one that was stopped reads nothing

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


async def run(spec: EngineSpec, options: EngineOptions) -> None:
    """Serve until SIGTERM."""
    engine = MockEngine(spec, options)
    runner = web.AppRunner(engine.app(), handler_cancellation=True, access_log=None, keepalive_timeout=3600)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024, shutdown_timeout=STOP_SECONDS)
    await site.start()
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    port = runner.addresses[0][1]
    replace(spec.dir / "ready.json", json.dumps({"url": f"http://127.0.0.1:{port}"}).encode(), durable=False)
    await told.wait()
    await engine.stop()
    await runner.cleanup()


def main() -> int:
    spec = read_spec(Path(sys.argv[1]))
    options = msgspec.convert(spec.options, EngineOptions)
    if options.load_error:
        print(options.load_error, file=sys.stderr)
        return START_FAILED
    end_with_parent()
    time.sleep(options.load_seconds)
    asyncio.run(run(spec, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
