"""A real `arbor-serve` process, driven by the real `openai` client."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import server_process

from arbor_core.testing.forks import Process

ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class LiveServer:
    """A server process of the test's own."""

    process: Process
    url: str
    storage: Path
    log_file: Path
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def new_client(self, key: str = "unused", **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 180, "_strict_response_validation": True, **options}
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

    def wait(self, job_id: str, *statuses: str, seconds: float = 300) -> Any:
        """Wait until a job has one of these statuses (default: it has ended)."""
        deadline = time.monotonic() + seconds
        while (job := self.client.fine_tuning.jobs.retrieve(job_id)).status not in (statuses or ENDED):
            assert job.status not in ENDED, f"the job ended as {job.status}: {job.error}\n{self.log}"
            assert time.monotonic() < deadline, f"the job is still {job.status}\n{self.log}"
            time.sleep(0.03)
        return job

    def cancel_all(self) -> None:
        """Cancel every job and wait for their ends: attempts go on when a server ends."""
        with urllib.request.urlopen(f"{self.url}/v1/fine_tuning/jobs?limit=100") as answer:
            jobs = [job["id"] for job in json.load(answer)["data"] if job["status"] not in ENDED]
        for job in jobs:
            asking = urllib.request.Request(f"{self.url}/v1/fine_tuning/jobs/{job}/cancel", method="POST")
            urllib.request.urlopen(asking).close()
        deadline = time.monotonic() + 120
        for job in jobs:
            while self._status(job) not in ENDED:
                assert time.monotonic() < deadline, f"job {job} was not cancelled\n{self.log}"
                time.sleep(0.03)

    def _status(self, job: str) -> str:
        with urllib.request.urlopen(f"{self.url}/v1/fine_tuning/jobs/{job}") as answer:
            return str(json.load(answer)["status"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process; returns its exit status."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(120)


def engine_dir(server: LiveServer) -> Path:
    """Directory of the engine that started last. One that could not start has a directory too, for its log."""
    started = (path.parent for path in (server.storage / "engines").glob("*/ready.json"))
    return max(started, key=lambda folder: int(folder.name))


def process_of(folder: Path) -> int:
    """Process id of the engine that works in a directory."""
    wanted = str(folder / "spec.json").encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no engine works in {folder}")


def launch(
    storage: Path, *overrides: str, mock: bool = True, env: dict[str, str] | None = None, before: str = ""
) -> LiveServer:
    """Start `arbor-serve` on a free port and wait for the line that says where it listens.

    Args:
        before: Python to run in its process before it begins: a test may be less patient than a server.
    """
    storage.mkdir(parents=True, exist_ok=True)
    log_file = storage / "server.log"
    variables = {**os.environ, "ARBOR_HOME": str(storage / "home"), **(env or {})}
    variables.pop("ARBOR_MOCK_GPU", None)
    if mock:
        variables["ARBOR_MOCK_GPU"] = "1"
    with log_file.open("ab") as output:
        arguments = ["port=0", f"storage={storage / 'data'}", *overrides]
        process = server_process.start(arguments, variables, output, before)
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line.startswith("arbor: listening on "):
        process.kill()
        process.wait()
        raise RuntimeError(f"the server did not start: {line}{log_file.read_text()}")
    return LiveServer(process, line.split()[-1], storage / "data", log_file)
