"""What clients do in the chaos: they upload, create jobs, ask for things, give up half-way, and read slowly."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import threading
import time
from collections import Counter
from typing import Any

from chaos_checks import Ledger
from chaos_commands import CommandClient
from chaos_jobs import JobClient
from chaos_rollouts import Lesson
from http_calls import JOBS, MULTIPART, PURPOSE, Answer, call, form, raw_socket
from live import ENDED, LiveServer

Kind = tuple[str, dict[str, Any]]
"""A trainer's name and the hyperparameters for it."""


class Clients:
    """The clients of one run; what they were told goes into the ledger."""

    server: LiveServer

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.ledger = Ledger()
        self.slow: list[threading.Thread] = []
        self.job_clients: dict[str, JobClient] = {}
        """Of jobs that learn from what clients send."""
        self.lossy = False
        """The disk is full now and then: completions may remain unknown."""
        self.rows = ""
        """Id of the file that all jobs train on."""

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer | None:
        """One request; None where the server went away under it, or ended. A 5xx about jobs or files is a violation."""
        try:
            answer = call(self.server.url, method, path, body, headers)
        except (OSError, http.client.HTTPException):
            self.counts["requests cut off"] += 1
            return None
        if answer.status == 503 and b'"server_shutting_down"' in answer.body:  # it waited as long as an end may take
            self.counts["requests cut off"] += 1
            return None
        self.counts["requests answered"] += 1
        if answer.status >= 500 and not path.startswith("/v1/chat") and answer.status != 507:
            self.ledger.faults.append(f"{method} {path} was answered {answer.status}: {answer.body[:300]!r}")
        return answer

    def upload(self, content: bytes) -> str:
        answer = self.ask("POST", "/v1/files", form(PURPOSE, ("file", content, "rows.jsonl")), MULTIPART)
        if answer is None or answer.status != 200:
            return ""
        self.ledger.files[answer.json["id"]] = content
        return str(answer.json["id"])

    def create(self, kind: Kind) -> str:
        name, hyper = kind
        method = {"type": name, name: {"hyperparameters": hyper}}
        body = {"model": "tiny", "seed": 7, "method": method}
        if not is_live(name):
            body["training_file"] = self.rows
        answer = self.ask("POST", JOBS, body)
        if answer is None or answer.status != 200:
            return ""
        job_id = str(answer.json["id"])
        self.ledger.jobs[job_id] = json.dumps(kind)
        self.counts[f"{name} jobs created"] += 1
        return job_id

    def play(self, kind: Kind) -> None:
        """Create a job that learns from rollouts or executes commands, and a client of it beside all that goes on."""
        if job_id := self.create(kind):
            seed = self.draw.randrange(1 << 30)
            size = kind[1].get("num_generations")
            client = Lesson(self, job_id, size, seed) if size else CommandClient(self, job_id, seed)
            self.job_clients[job_id] = client
            client.start()

    def end_live_jobs(self) -> None:
        """Have these jobs end well; one whose creation was not acknowledged has nobody who could end it."""
        for client in self.job_clients.values():
            client.hurry.set()
        for job_id in self.jobs():
            answer = self.ask("GET", f"{JOBS}/{job_id}")
            if answer and is_live(answer.json["method"]["type"]) and job_id not in self.job_clients:
                self.ask("POST", f"{JOBS}/{job_id}/cancel")

    def jobs(self, *statuses: str) -> list[str]:
        """Ids of jobs in these states (none: of all that have not ended), as the server tells them now."""
        found, after = [], ""
        while True:
            answer = self.ask("GET", f"{JOBS}?limit=100{after}")
            if answer is None or answer.status != 200:
                return []
            for job in answer.json["data"]:
                self.ledger.saw(job["id"], job["status"])
                if job["status"] in statuses or (not statuses and job["status"] not in ENDED):
                    found.append(job["id"])
            if not answer.json["has_more"]:
                return found
            after = f"&after={answer.json['data'][-1]['id']}"

    def ask_of_job(self, word: str) -> None:
        if ids := self.jobs():
            job_id = self.draw.choice(ids)
            answer = self.ask("POST", f"{JOBS}/{job_id}/{word}")
            if answer and answer.status == 200:
                self.counts[word] += 1
                self.ledger.saw(job_id, answer.json["status"])
                if word == "cancel":
                    self.ledger.cancelled.add(job_id)

    def upload_cut_short(self) -> None:
        raw = form(PURPOSE, ("file", os.urandom(200_000), "cut.jsonl"))
        cut = raw[: self.draw.randrange(len(raw))]
        with contextlib.suppress(OSError), raw_socket(self.server.url) as connection:
            connection.sendall(head("/v1/files", MULTIPART["content-type"], raw) + cut)
            self.counts["uploads cut short"] += 1

    def slow_client(self) -> None:
        """Reads a streamed answer a few bytes at a time, while all else goes on."""
        self.slow = [thread for thread in self.slow if thread.is_alive()]
        if len(self.slow) < 4:
            self.slow.append(threading.Thread(target=self.read_slowly, args=(self.server.url,), daemon=True))
            self.slow[-1].start()

    def read_slowly(self, url: str) -> None:
        said = [{"role": "user", "content": "[mock: token_seconds=0.02] a long story"}]
        raw = json.dumps({"model": "tiny", "stream": True, "max_tokens": 64, "messages": said}).encode()
        with contextlib.suppress(OSError), raw_socket(url) as connection:
            connection.sendall(head("/v1/chat/completions", "application/json", raw) + raw)
            while connection.recv(200):
                time.sleep(0.02)
        self.counts["slow clients"] += 1


def is_live(method: str) -> bool:
    """Whether a job of this method learns from what clients send, and not from a file."""
    return method.endswith(("grpo", "_commands"))


def head(path: str, kind: str, raw: bytes) -> bytes:
    """What comes before the body of a request."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Type: {kind}")
    return "\r\n".join((*lines, f"Content-Length: {len(raw)}", "", "")).encode()


def training_rows() -> bytes:
    """Thirty-two rows of widely varying length."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcd", k=draw.randint(2, 6 if n % 4 else 120))) for n in range(32)]
    rows = [[{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}] for word in words]
    return b"".join(json.dumps({"messages": row}).encode() + b"\n" for row in rows)
