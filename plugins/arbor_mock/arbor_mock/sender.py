"""A sender that is no file: the trainer keeps versions in its memory, and engines fetch them over a loopback socket.

It is a collective, as NCCL's are: rank 0 lets a version out when all other ranks have sent it too.
"""

import secrets
import shutil
import socket
import socketserver
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import ArborError, PolicyWeights, Run, Sender, replace

KEPT = 4
"""Versions that can still be fetched."""
FETCH_SECONDS = 10.0
RANKS_SECONDS = 60.0
"""How long ranks wait for one another."""
ADDRESS = "sender.json"
"""The file in an attempt's scratch directory in which the other ranks find rank 0."""


class Fetch(msgspec.Struct, tag="fetch"):
    """What an engine asks for, in one line of JSON."""

    version: int
    token: str


class Joined(msgspec.Struct, tag="joined"):
    """What another rank says that sends a version, likewise."""

    version: int
    token: str
    rank: int


class Address(msgspec.Struct):
    port: int
    token: str


def sender(run: Run[Any]) -> Sender:
    """One rank's part of it."""
    return FirstRank(run) if run.rank == 0 else OtherRank(run)


class FirstRank:
    """Hands out the versions of one attempt."""

    def __init__(self, run: Run[Any]) -> None:
        self.run = run
        self.versions: dict[int, bytes] = {}
        self.joined: defaultdict[int, set[int]] = defaultdict(set)
        """The other ranks that have sent each version."""
        self.changed = threading.Condition()
        self.address = Address(serve(self), secrets.token_urlsafe(16))
        replace(run.work / ADDRESS, msgspec.json.encode(self.address))

    def send(self, version: int, weights: PolicyWeights) -> Mapping[str, Any]:
        """See `arbor_core.Sender.send`."""
        content = self.packed(weights)
        others = set(range(1, self.run.world_size))
        with self.changed:
            if not self.changed.wait_for(lambda: others <= self.joined[version], RANKS_SECONDS):
                missing = sorted(others - self.joined[version])
                raise ArborError(f"the ranks {missing} have not sent policy version {version}, and rank 0 has")
            del self.joined[version]
        self.versions[version] = content
        for old in sorted(self.versions)[:-KEPT]:
            del self.versions[old]
        return {"version": version, **msgspec.to_builtins(self.address)}

    def packed(self, weights: PolicyWeights) -> bytes:
        """The weights' files as one text."""
        folder = self.run.work / "sent"
        folder.mkdir()
        try:
            weights.write(folder)
            return msgspec.json.encode({path.name: path.read_bytes() for path in folder.iterdir()})
        finally:
            shutil.rmtree(folder)

    def hear(self, said: Fetch | Joined) -> bytes:
        """The answer to one line."""
        if not secrets.compare_digest(said.token, self.address.token):
            return b""
        if isinstance(said, Fetch):
            return self.versions.get(said.version, b"")
        with self.changed:
            self.joined[said.version].add(said.rank)
            self.changed.notify()
        return b""


class OtherRank:
    """Takes part, and has nothing to hand out: rank 0 has all files."""

    def __init__(self, run: Run[Any]) -> None:
        self.run = run

    def send(self, version: int, weights: PolicyWeights) -> Mapping[str, Any]:
        """See `arbor_core.Sender.send`."""
        weights.write(None)
        first = self.first()
        ask(first.port, Joined(version, first.token, self.run.rank))
        return {}

    def first(self) -> Address:
        """Where rank 0 is; it may begin a little later.

        Raises:
            ArborError: it does not begin.
        """
        until = time.monotonic() + RANKS_SECONDS
        while time.monotonic() < until:
            with suppress(FileNotFoundError):
                return msgspec.json.decode((self.run.work / ADDRESS).read_bytes(), type=Address)
            time.sleep(0.01)
        raise ArborError(f"rank {self.run.rank} sends a policy, and rank 0 does not")


def serve(first: FirstRank) -> int:
    """Answer lines on a port of 127.0.0.1, which it returns, until the process ends."""

    class Handler(socketserver.StreamRequestHandler):
        timeout = FETCH_SECONDS

        def handle(self) -> None:
            self.wfile.write(first.hear(msgspec.json.decode(self.rfile.readline(1000), type=Fetch | Joined)))

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def ask(port: int, line: Fetch | Joined) -> bytes:
    """Say a line to rank 0; its answer.

    Raises:
        OSError: it does not answer.
    """
    with socket.create_connection(("127.0.0.1", port), FETCH_SECONDS) as connection:
        connection.sendall(msgspec.json.encode(line) + b"\n")
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def fetch(sent: Mapping[str, Any], folder: Path) -> None:
    """Get a version, in an engine, as files in a folder.

    Raises:
        ArborError: its trainer has gone, or has it no more.
    """
    try:
        raw = ask(sent["port"], Fetch(sent["version"], sent["token"]))
    except OSError as error:
        raise ArborError(f"the trainer of policy version {sent['version']} does not answer: {error}") from None
    if not raw:
        raise ArborError(f"the trainer does not have policy version {sent['version']} any more")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in msgspec.json.decode(raw, type=dict[str, bytes]).items():
        (folder / Path(name).name).write_bytes(content)
