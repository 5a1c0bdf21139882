"""A client of one job in the chaos: what those that teach and those that send commands have in common."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from http_calls import raw_socket

if TYPE_CHECKING:
    from chaos_clients import Clients

RETRY_SECONDS = 0.3
REFUSED_LATE = "invalid_job_state"


class JobClient(threading.Thread):
    """Works with a job until it has ended. Where it got no answer, it asks again as before."""

    def __init__(self, clients: Clients, job_id: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.clients, self.job_id = clients, job_id
        self.draw = random.Random(seed)
        self.hurry = threading.Event()
        """Set: have the job end well, soon."""
        self.rest = threading.Event()

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.fault(f"its client gave up: {type(error).__name__}: {error}")
            raise

    def work(self) -> None:
        raise NotImplementedError

    def violations(self, storage: Path) -> Iterator[str]:
        """What does not hold of what the server had told, after the job's end."""
        raise NotImplementedError

    def fault(self, text: str) -> None:
        self.clients.ledger.faults.append(f"{self.job_id}: {text}")

    def hang_up(self, path: str, body: dict[str, Any]) -> None:
        """Send something and wait for no answer."""
        raw = json.dumps(body).encode()
        lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(raw)}", "", "")).encode()
        with contextlib.suppress(OSError), raw_socket(self.clients.server.url) as connection:
            connection.sendall(head + raw)
            self.clients.counts["requests whose sender hung up"] += 1
