"""What OpenAI's client cannot send, and what every error must look like."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from live import LiveServer

JOBS = "/v1/fine_tuning/jobs"
BASE = "mock/tiny"
"""Any name will do: the mock plugin trains and serves without weights."""
PURPOSE = ("purpose", b"fine-tune")
FILE = ("file", b"{}\n", "rows.jsonl")
PATIENCE = 120
"""Seconds: an engine that starts on a machine with much else to do takes its time."""
MULTIPART = {"content-type": "multipart/form-data; boundary=XX"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def error(self, status: int, code: str, param: str | None = None) -> dict[str, Any]:
        """The error object, after making sure that it is one, in full, and this one."""
        assert self.status == status, self.body
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"].startswith("req_")
        error: dict[str, Any] = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code, error
        assert error["param"] == param, error
        assert error["message"]
        assert "Traceback" not in error["message"]
        return error


def call(url: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """One request, sent as it is. `body`: bytes as they are, an iterable of bytes in chunks, anything else as JSON."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=PATIENCE)
    try:
        raw = json.dumps(body).encode() if isinstance(body, dict | list) else body
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before all is sent
            connection.request(method, path, raw, dict(headers or {}))
        if connection.sock is None:
            raise ConnectionResetError("the server went away")
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def raw_socket(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname or "", where.port or 0), timeout=PATIENCE)


def form(*parts: tuple[str, bytes] | tuple[str, bytes, str]) -> bytes:
    """A multipart body (boundary XX): (name, content) for a text, (name, content, filename) for a file."""
    found = []
    for name, content, *filename in parts:
        file = f'; filename="{filename[0]}"' if filename else ""
        found += [f'--XX\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode(), content, b"\r\n"]
    return b"".join(found) + b"--XX--\r\n"


def post(server: LiveServer, *parts: Any, headers: dict[str, str] | None = None) -> Answer:
    return call(server.url, "POST", "/v1/files", form(*parts), headers or MULTIPART)


def stored(server: LiveServer) -> set[str]:
    """Everything on the disk that uploads have left."""
    return {str(path) for path in (server.storage / "files").rglob("*") if path.is_file()}


def settled(server: LiveServer) -> set[str]:
    """What is stored once no upload is under way."""
    incoming, deadline = server.storage / "files" / ".incoming", time.monotonic() + PATIENCE
    while any(incoming.iterdir()):
        assert time.monotonic() < deadline, f"left behind: {list(incoming.iterdir())}"
        time.sleep(0.01)
    return stored(server)


def submit(server: LiveServer, file: str, **fields: Any) -> Answer:
    return call(server.url, "POST", JOBS, {"model": BASE, "training_file": file, **fields})


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def events(server: LiveServer, job_id: str) -> list[Any]:
    return list(server.client.fine_tuning.jobs.list_events(job_id, limit=100))
