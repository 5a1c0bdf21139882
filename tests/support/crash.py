"""The fault points of the crash matrices, and what must hold when a process has died at one.

Those in `..._ALWAYS` belong to every run; the others are marked `crash`. `tests/test_crash_points.py` fails when one
of the code is missing here.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from http_calls import Answer, call
from live import LiveServer

from arbor_core.testing.invariants import Seen, check_invariants, processes

SERVER_ALWAYS = ["job.running", "attempt.started", "result.stored"]
SERVER = [
    "upload.renamed",
    "job.validated",
    "events.taken",
    "job.settled",
    "upload.opened",
    "upload.written",
    "upload.stored",
    "job.created",
    "job.document",
    "job.queued",
    "job.pause",
    "job.run",
    "job.cancel",
    "lease.acquired",
    "lease.released",
    "attempt.desired",
    "attempt.ordered",
    "attempt.noted",
    "attempt.told",
    "attempt.signalled",
    "attempt.ended",
    "attempt.tidied",
    "file.written",
    "file.renamed",
    "file.written:3",
    "file.renamed:3",
    *(f"store.{when}:{count}" for count in (1, 2, 3, 4, 5, 7, 9) for when in ("changed", "committed")),
]
WORKERS_ALWAYS = ["checkpoint.renamed"]
WORKERS = [
    "supervisor.ended",
    "checkpoint.written",
    "checkpoint.vouched",
    "checkpoint.event",
    "checkpoint.event:2",
    "checkpoint.renamed:2",
    "result.event",
    "paused.event",
    "metrics.event:3",
    "resolved.event",
    "message.event",
    "supervisor.claimed",
    "supervisor.forked",
    "supervisor.told",
    "file.written",
    "file.renamed",
    "file.written:3",
    "forkserver.requested",
    "forkserver.forked",
]

REMOTE = ("executor=mock_node", "allocator=mock_node")
"""A server whose attempts run on another machine."""
REMOTE_SERVER_ALWAYS = ["attempt.started"]
REMOTE_SERVER = [
    "lease.acquired",
    "job.running",
    "attempt.ordered",
    "attempt.noted",
    "attempt.told",
    "attempt.signalled",
    "attempt.ended",
    "attempt.tidied",
    "job.settled",
]
REMOTE_MACHINE = [
    "node.started",
    "node.claimed",
    "node.started:2",
    "node.ended",
    "node.ended:2",
    "checkpoint.renamed",
    "checkpoint.event",
    "metrics.event:3",
    "paused.event",
    "result.event",
]
"""The machine's process and its workers."""

SESSION_SERVER_ALWAYS = ["inbox.written", "inbox.synced", "ledger.written:3"]
SESSION_SERVER = [
    "inbox.written:3",
    "inbox.synced:3",
    "inbox.marked",
    "ledger.written",
    "checkpoint.asked",
    "job.finish",
    "forgotten.weights",
    "forgotten.ledger",
    "forgotten.asked",
]
SESSION_WORKERS_ALWAYS = ["weights.renamed", "name_checkpoint.told", "samples.written:2"]
SESSION_WORKERS = [
    "weights.written",
    "weights.written:3",
    "weights.renamed:3",
    "published.event",
    "published.event:3",
    "metrics.event",
    "metrics.event:3",
    "samples.written",
    "checkpoint.renamed",
    "checkpoint.event",
    "name_checkpoint.linked",
    "name_checkpoint.answered",
    "result.event",
]
COMMAND_SERVER_ALWAYS = ["results.acknowledged"]
COMMAND_SERVER = [
    "inbox.written:2",
    "inbox.synced:3",
    "inbox.marked:4",
    "inbox.rotated:2",
    "results.acknowledged:3",
    "results.dropped",
    "results.dropped:4",
    "job.finish",
]
COMMAND_WORKERS_ALWAYS = ["results.synced:3"]
COMMAND_WORKERS = [
    "results.written",
    "results.written:5",
    "results.synced",
    "results.marked",
    "results.marked:4",
    "results.rotated",
    "results.rotated:4",
    "checkpoint.renamed",
    "checkpoint.event",
    "weights.renamed",
    "published.event",
    "metrics.event:3",
    "result.event",
]
SMALL_SEGMENTS = {"ARBOR_SEGMENT_BYTES": "1"}
"""Each record of an inbox or of results has a segment to itself."""
COMMAND_DIRECT_ALWAYS = ["weights.sent:2"]
COMMAND_DIRECT = ["weights.sent", "weights.fetched", "published.event:2", "checkpoint.renamed:2"]
"""With engines that get policies from the memory of the trainer that executes commands."""
RESULTS_ALWAYS = ["results.synced", "results.dropped"]
RESULTS = [
    "results.written",
    "results.marked",
    "results.marked:3",
    "results.rotated",
    "results.acknowledged",
    "results.dropped:2",
]
SEGMENTS = [f"{log}.rotated{count}" for count in ("", ":2") for log in ("inbox", "ledger", "samples")]
DIRECT_ALWAYS = ["weights.fetched"]
DIRECT = ["weights.sent", "weights.sent:3", "weights.fetched:2", "published.event:2"]
"""With engines that get policies from the memory of their trainer: the trainer or an engine dies."""
DIRECT_SERVER = ["events.taken:3", "ledger.written:2"]
ENGINE_ALWAYS = ["engine.loaded"]
ENGINE = [
    "engine.starting",
    "engine.listening",
    "completion.begun",
    "completion.token",
    "completion.token:3",
    "adapter.loading",
    "adapter.loaded",
    "weights.fetched",
    "adapter.unloading",
    "engine.stopping",
]

UPLOAD_POINTS_ALWAYS = [
    "upload.written",
    "upload.renamed",
    "part.stored",
    "part.stored:2",
    "parts.joined",
    "parts.renamed",
    "upload.closed",
    "store.changed:2",
    "store.committed:2",
]
UPLOAD_POINTS = [f"store.{when}:{count}" for count in (1, 3, 4) for when in ("changed", "committed")]
UPGRADES = ["job.upgraded", "job.upgraded:4"]
"""While a server brings an old storage directory up to date."""


def marked(always: list[str], rest: list[str]) -> list[Any]:
    """Parameters of a test: the rest runs with `make crash` only."""
    return [*always, *(pytest.param(name, marks=pytest.mark.crash) for name in rest)]


def gone(storage: Path, seconds: float = 120) -> None:
    """Wait until no process works on the directory any more."""
    deadline = time.monotonic() + seconds
    while left := processes(storage):
        assert time.monotonic() < deadline, f"these processes are left: {left}"
        time.sleep(0.02)


def check_the_rest(server: LiveServer, seen: Seen) -> None:
    """Stop a server whose jobs have ended: nothing of it is left, nothing that was seen is lost."""
    assert server.stop() == 0
    gone(server.storage)
    seen.look()
    check_invariants(server.storage)


PATIENCE = 120.0


@dataclass
class CrashClient:
    """A client of a server that dies under it: it has the server started again by `revive`, and asks once more."""

    server: LiveServer
    revive: Callable[[], LiveServer]

    def ask(self, method: str, path: str, body: Any = None, again: Collection[int] = ()) -> Answer:
        """The answer to a request. `again`: statuses after which it is sent again."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError, http.client.HTTPException):
                answer = call(self.server.url, method, path, body)
                if answer.status not in again:
                    return answer
            assert time.monotonic() < deadline, self.server.log
            if self.server.process.poll() is not None:
                self.server = self.revive()

    def play(self) -> None:
        """From the first request to the end of a job."""
        raise NotImplementedError

    def check(self) -> None:
        """What it was told holds."""
        raise NotImplementedError

    def finished(self, seen: Seen) -> None:
        """Check everything, and stop the server."""
        self.check()
        check_the_rest(self.server, seen)
