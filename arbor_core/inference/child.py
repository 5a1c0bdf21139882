"""What every engine process needs, whatever serves its model: its side of the agreement with `EngineProcess`.

An engine process calls `end_with_parent` before anything slow, reads its specification with `read_spec`, binds a
loopback port of its own choice, loads the model, and says with `announce` where it listens. It serves `routes`, demands
the specification's token on all of them but /health (`authorised`), answers /health with `health`, and errors with
`arbor_core.engine.envelope`. On SIGTERM it ends within seconds.
"""

from __future__ import annotations

import hmac
import json
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.process.prctl import PR_SET_PDEATHSIG, prctl
from arbor_core.storage.atomic import replace
from arbor_core.types import EngineSpec

READY = "ready.json"
"""File in an engine's directory that says where it listens: `{"url": "http://127.0.0.1:..."}`."""

Handler = Callable[[Any], Awaitable[Any]]
"""A request handler of the engine's HTTP library."""


def end_with_parent() -> None:
    """From now on, end at once when the server is gone, however it ended: it holds the other end of standard input."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a process that is stopped reads nothing

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)  # without asking any other thread: each may hang in whatever it does

    threading.Thread(target=wait, daemon=True).start()


def read_spec(path: str | Path) -> EngineSpec:
    """The specification, whose path is the process's first argument."""
    crash_point("engine.starting")
    return msgspec.json.decode(Path(path).read_bytes(), type=EngineSpec, dec_hook=lambda type_, value: type_(value))


def announce(spec: EngineSpec, port: int) -> None:
    """Say that the engine answers on a port of 127.0.0.1; the server sends requests from then on."""
    crash_point("engine.loaded")
    replace(spec.dir / READY, json.dumps({"url": f"http://127.0.0.1:{port}"}).encode(), durable=False)
    crash_point("engine.listening")


class Routes(Protocol):
    """The request handlers of an engine. What each receives and answers: docs/inference.md."""

    @property
    def health(self) -> Handler: ...
    @property
    def models(self) -> Handler: ...
    @property
    def load(self) -> Handler: ...
    @property
    def unload(self) -> Handler: ...
    @property
    def update(self) -> Handler: ...
    @property
    def chat(self) -> Handler: ...
    @property
    def completions(self) -> Handler: ...


def routes(engine: Routes) -> list[tuple[str, str, Handler]]:
    """Method, path and handler of every route that the server calls: OpenAI's, vLLM's two for adapters, one for new
    weights."""
    return [
        ("GET", "/health", engine.health),
        ("GET", "/v1/models", engine.models),
        ("POST", "/v1/load_lora_adapter", engine.load),
        ("POST", "/v1/unload_lora_adapter", engine.unload),
        ("POST", "/v1/update_weights", engine.update),
        ("POST", "/v1/chat/completions", engine.chat),
        ("POST", "/v1/completions", engine.completions),
    ]


def authorised(spec: EngineSpec, path: str, header: str) -> bool:
    """Whether a request may be served.

    Args:
        path: Of its URL; /health is open.
        header: Its `Authorization`, or nothing.
    """
    if not spec.token or path == "/health":
        return True
    sent = header.encode(errors="surrogateescape")  # what is no UTF-8 is no token either
    return hmac.compare_digest(sent, f"Bearer {spec.token}".encode())


class Progress:
    """When an engine last made progress. Written by the thread that generates, read by the one that answers /health,
    which sees the old value or the new one."""

    def __init__(self) -> None:
        self.at: float | None = None

    def mark(self) -> None:
        """There is work, and some of it was done."""
        self.at = time.monotonic()

    def idle(self) -> None:
        """There is no work."""
        self.at = None

    @property
    def stalled_seconds(self) -> float:
        """Seconds without progress while there is work; 0 without work."""
        at = self.at
        return 0.0 if at is None else time.monotonic() - at


def health(
    spec: EngineSpec, adapters: Iterable[str], *, running: int, waiting: int, stalled_seconds: float
) -> dict[str, Any]:
    """The body of the answer to `GET /health`.

    Args:
        adapters: Names of those that are loaded.
        running: Sequences that are being generated.
        waiting: Sequences or requests that wait for a place.
        stalled_seconds: Seconds without progress while the engine has work; 0 without work.
    """
    return {
        "status": "ok",
        "model": spec.model,
        "adapters": list(adapters),
        "running": running,
        "waiting": waiting,
        "stalled_seconds": stalled_seconds,
        "quiet_seconds": stalled_seconds,  # its former name, which older servers read
    }
