"""Completions of the mock engine over raw HTTP: requests, streams, and how the engine is."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from http_calls import Answer, call
from live import LiveServer, engine_dir

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
MODEL = "mock/tiny"


def asked(text: str, **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def post(server: LiveServer, path: str, body: Any) -> Answer:
    return call(server.url, "POST", path, body, {"content-type": "application/json"})


def frames(raw: bytes) -> list[Any]:
    """The events of a stream, every one of them whole."""
    assert raw.endswith(b"data: [DONE]\n\n")
    events = [event for event in raw.decode().split("\n\n")[:-2] if not event.startswith(":")]
    return [json.loads(event.removeprefix("data: ")) for event in events]


def engine_health(server: LiveServer) -> dict[str, Any]:
    url = json.loads((engine_dir(server) / "ready.json").read_bytes())["url"]
    with urllib.request.urlopen(f"{url}/health") as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found
