"""How fast groups of text get into a job's inbox: 8 completions of 2,000 tokens each, durable when answered.

One process sends over several connections; server and sender share the machine's cores. The job is paused meanwhile, so
that no trainer takes part. Beside it, what the disk needs for as many bytes with one fsync a group.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from http_calls import call
from live import LiveServer, launch

GRPO = "/v1/fine_tuning/grpo"
GENERATIONS, TOKENS, CONNECTIONS, GROUPS, JOBS = 8, 2000, 8, 300, 3
WORD = "word "  # a token or so


def paused_job(server: LiveServer) -> str:
    """A job with room for all groups, whose trainer does not run."""
    config = {"num_generations": GENERATIONS, "max_staleness": 64}
    made = call(server.url, "POST", f"{GRPO}/initialize", {"model": "mock/tiny", "trainer_config": config})
    job = str(made.json["job_id"])
    while call(server.url, "POST", f"{GRPO}/status", {"job_id": job}).json["status"] != "paused":
        call(server.url, "POST", f"/v1/fine_tuning/jobs/{job}/pause")
        time.sleep(0.1)
    return job


def bodies(job: str) -> list[bytes]:
    """A group for each request, no two alike."""
    text = WORD * (TOKENS * 4 // len(WORD))  # four characters a token
    found = []
    for number in range(GROUPS):
        batch = [
            {
                "messages": [{"role": "user", "content": f"question {number}"}],
                "completion": {"role": "assistant", "content": f"{number} {k} {text}"},
                "reward": k / GENERATIONS,
            }
            for k in range(GENERATIONS)
        ]
        found.append(json.dumps({"job_id": job, "batch": batch}).encode())
    return found


def sent(server: LiveServer, requests: list[bytes]) -> tuple[float, list[float]]:
    """Seconds for all requests, and for each."""
    where = urlsplit(server.url)
    left, took, lock = list(requests), [], threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection(where.hostname or "", where.port)
        while True:
            with lock:
                if not left:
                    return
                body = left.pop()
            begin = time.perf_counter()
            connection.request("POST", f"{GRPO}/step", body)
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == 200, said
            took.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin, took


def synced(folder: Path, size: int) -> float:
    """Groups a second that the disk takes, one fsync each."""
    with (folder / "probe").open("wb", buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(100):
            file.write(os.urandom(size))
            os.fsync(file.fileno())
    return 100 / (time.perf_counter() - begin)


def measured() -> dict[str, Any]:
    rates, took, size = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        server = launch(Path(folder))
        try:
            for _ in range(JOBS):
                job = paused_job(server)
                requests = bodies(job)
                size = len(requests[0])
                seconds, each = sent(server, requests)
                rates.append(GROUPS / seconds)
                took += each
                call(server.url, "POST", f"{GRPO}/cancel", {"job_id": job})
            disk = synced(server.storage, size)
        finally:
            server.stop()
    return {
        "bytes": size,
        "connections": CONNECTIONS,
        "groups_per_second": statistics.median(rates),
        "p99_ms": statistics.quantiles(took, n=100)[98] * 1000,
        "disk_groups_per_second": disk,
    }


if __name__ == "__main__":
    print(json.dumps(measured()))
