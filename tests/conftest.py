"""Fixtures: a real `arbor-serve` process, driven by the real `openai` client; and a plugin made on the spot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from arbor_core import hookimpl
from arbor_core.plugins import Plugins, new_manager

START_SECONDS = 60
ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class LiveServer:
    """A server process of the test's own."""

    process: subprocess.Popen[bytes]
    url: str
    storage: Path
    log_file: Path
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def new_client(self, key: str = "unused", **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 60, "_strict_response_validation": True, **options}
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)
        self.clients.append(client)
        return client

    @property
    def client(self) -> openai.OpenAI:
        return self.clients[0] if self.clients else self.new_client()

    def upload(self, rows: list[dict[str, Any]] | bytes, purpose: str = "fine-tune") -> str:
        """Upload rows as JSONL; returns the file's id."""
        raw = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        return self.client.files.create(file=("rows.jsonl", raw), purpose=purpose).id  # type: ignore[arg-type]

    def wait(self, job_id: str, *statuses: str, seconds: float = 90) -> Any:
        """Wait until a job has one of these statuses (default: it has ended)."""
        deadline = time.monotonic() + seconds
        while (job := self.client.fine_tuning.jobs.retrieve(job_id)).status not in (statuses or ENDED):
            assert job.status not in ENDED, f"the job ended as {job.status}: {job.error}\n{self.log}"
            assert time.monotonic() < deadline, f"the job is still {job.status}\n{self.log}"
            time.sleep(0.03)
        return job

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process; returns its exit status."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


def launch(storage: Path, *overrides: str, mock: bool = True, env: dict[str, str] | None = None) -> LiveServer:
    """Start `arbor-serve` on a free port and wait for the line that says where it listens."""
    storage.mkdir(parents=True, exist_ok=True)
    log_file = storage / "server.log"
    variables = {**os.environ, "ARBOR_HOME": str(storage / "home"), **(env or {})}
    variables.pop("ARBOR_MOCK_GPU", None)
    if mock:
        variables["ARBOR_MOCK_GPU"] = "1"
    with log_file.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "arbor_core", "serve", "port=0", f"storage={storage / 'data'}", *overrides],
            stdout=subprocess.PIPE,
            stderr=output,
            env=variables,
        )
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line.startswith("arbor: listening on "):
        process.kill()
        process.wait()
        raise RuntimeError(f"the server did not start: {line}{log_file.read_text()}")
    return LiveServer(process, line.split()[-1], storage / "data", log_file)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """`start_server("launcher=cold", mock=False)` starts a server of the test's own; every one is ended."""
    servers: list[LiveServer] = []

    def start(*overrides: str, storage: Path | None = None, **options: Any) -> LiveServer:
        servers.append(launch(storage or tmp_path, *overrides, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server with the mock trainer, engine and devices, for all tests that do not break it."""
    live = launch(tmp_path_factory.mktemp("server"))
    yield live
    live.stop()


@pytest.fixture
def chat_rows() -> list[dict[str, Any]]:
    """Twelve rows that supervised fine-tuning accepts."""
    return [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
        for n in range(12)
    ]


@pytest.fixture
def plugins() -> Plugins:
    """The hooks and no plugin: entry points are not read."""
    return Plugins(new_manager())


@pytest.fixture
def plugin(plugins: Plugins) -> Callable[..., None]:
    """`plugin("acme 1.0", arbor_trainers=lambda: {...})` registers a plugin with these hooks."""

    def register(name: str, **hooks: Callable[..., Any]) -> None:
        module = SimpleNamespace(**{hook: hookimpl(function) for hook, function in hooks.items()})
        plugins.manager.register(module, name=name)

    return register
