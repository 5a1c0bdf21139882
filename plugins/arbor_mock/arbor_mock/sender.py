"""A sender that is no file: the trainer keeps versions in its memory, and engines fetch them over a loopback socket."""

import base64
import secrets
import shutil
import socket
import socketserver
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import ArborError, PolicyWeights, Run

KEPT = 4
"""Versions that can still be fetched."""
FETCH_SECONDS = 10.0


class Fetch(msgspec.Struct):
    """What an engine asks for, in one line of JSON."""

    version: int
    token: str


class LoopbackSender:
    """Hands out the versions of one attempt. Rank 0 has a server; the others have nothing to send."""

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.token = run, secrets.token_urlsafe(16)
        self.versions: dict[int, bytes] = {}
        self.server = serve(self) if run.rank == 0 else None

    def send(self, version: int, weights: PolicyWeights) -> Mapping[str, Any]:
        """See `arbor_core.Sender.send`."""
        if self.server is None:
            weights.write(None)
            return {}
        folder = self.run.work / "sent"
        folder.mkdir()
        try:
            weights.write(folder)
            files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in folder.iterdir()}
        finally:
            shutil.rmtree(folder)
        self.versions[version] = msgspec.json.encode(files)
        for old in sorted(self.versions)[:-KEPT]:
            del self.versions[old]
        return {"port": self.server.server_address[1], "version": version, "token": self.token}


def serve(sender: LoopbackSender) -> socketserver.ThreadingTCPServer:
    """A server on a port of 127.0.0.1 that answers one line with a version, or with nothing."""

    class Handler(socketserver.StreamRequestHandler):
        timeout = FETCH_SECONDS

        def handle(self) -> None:
            wanted = msgspec.json.decode(self.rfile.readline(1000), type=Fetch)
            if secrets.compare_digest(wanted.token, sender.token):
                self.wfile.write(sender.versions.get(wanted.version, b""))

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def fetch(sent: Mapping[str, Any], folder: Path) -> None:
    """Get a version, in an engine, as files in a folder.

    Raises:
        ArborError: its trainer has gone, or has it no more.
    """
    try:
        with socket.create_connection(("127.0.0.1", sent["port"]), FETCH_SECONDS) as connection:
            connection.sendall(msgspec.json.encode(Fetch(sent["version"], sent["token"])) + b"\n")
            raw = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    except OSError as error:
        raise ArborError(f"the trainer of policy version {sent['version']} does not answer: {error}") from None
    if not raw:
        raise ArborError(f"the trainer does not have policy version {sent['version']} any more")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in msgspec.json.decode(raw, type=dict[str, bytes]).items():
        (folder / Path(name).name).write_bytes(content)
