"""The limits of the server, found by simulation: many devices, many jobs, a hundred clients, one process.

    python bench/simulation.py [--full] [--dir DIR]

2,000 jobs and 100 simulated devices; with --full 20,000 and 1,000. The executor `mock` runs attempts without processes,
everything else is the real server with its files and its database on the disk. Three runs:

- `quiet`: all other jobs have ended, and a hundred clients make a request a second each: retrieve (60 %), list (15 %),
  create (15 %) and health (10 %), which asks for nothing: what it takes is the machine. Times are what clients see.
- `busy`: the same clients, while the other jobs keep all devices busy. They take as long as it needs for 60 of them to
  start in a second.
- `rate`: jobs that take no time, without clients: how many attempts start in a second.

Prints JSON on its last line. `database_growth`: what the second half of the ended jobs adds to the database against the
first; 1 is linear.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from server import memory_mb

CLIENTS = 100
STARTS = 60
"""Jobs that may start in a second while clients are served."""
ROWS = b"".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]}
    ).encode()
    + b"\n"
    for n in range(12)
)
JOBS = "/v1/fine_tuning/jobs"


@dataclass(frozen=True)
class Scale:
    """How much there is of everything."""

    jobs: int
    devices: int
    ending: int
    """Jobs that have not ended when the server starts."""
    seconds: float
    """How long clients are measured."""


SMALL = Scale(2_000, 100, 600, 15)
FULL = Scale(20_000, 1_000, 6_000, 45)


@contextmanager
def serving(root: Path, scale: Scale) -> Iterator[tuple[str, int]]:
    """A server on the storage directory; yields its address and pid."""
    options = [f"gpu.train=[0-{scale.devices - 1}]", f"gpu.inference=[{scale.devices}]", "executor=mock"]
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "arbor_core", "serve", "port=0", f"storage={root / 'data'}", *options]
    env = {**os.environ, "ARBOR_MOCK_GPU": "1", "ARBOR_HOME": str(root / "home")}
    process = subprocess.Popen(
        [*command, "limits.queued_jobs=1000000"],
        stdout=subprocess.PIPE,
        stderr=(root / "server.log").open("ab"),
        text=True,
        env=env,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        process.wait()


def body(file: str, seconds: float) -> dict[str, Any]:
    """A job of four steps that takes so long."""
    hyper = {"steps": 4, "step_seconds": seconds / 4, "n_epochs": 1}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
    return {"model": "mock/tiny", "training_file": file, "method": method}


async def first_job(url: str, seconds: float) -> str:
    """Upload the rows and let one job run to its end: the others are copies of it. Returns the file's id."""
    async with aiohttp.ClientSession(url) as session:
        form = aiohttp.FormData({"purpose": "fine-tune"})
        form.add_field("file", ROWS, filename="rows.jsonl")
        async with session.post("/v1/files", data=form) as answer:
            file: str = (await answer.json())["id"]
        async with session.post(JOBS, json=body(file, seconds)) as answer:
            job = await answer.json()
        while job["status"] != "succeeded":
            await asyncio.sleep(0.1)
            async with session.get(f"{JOBS}/{job['id']}") as answer:
                job = await answer.json()
    return file


def store(root: Path, ended: int, ending: int) -> None:
    """Copy the first job: so many that have ended with all their events, and so many that are queued."""
    with sqlite3.connect(root / "data" / "arbor.db") as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(jobs)") if row[1] not in ("seq", "id")]
        events = [row[1] for row in db.execute("PRAGMA table_info(events)") if row[1] not in ("id", "job_id")]
        [(first, spec)] = db.execute("SELECT id,spec FROM jobs ORDER BY seq LIMIT 1")
        document = json.loads((root / "data" / "jobs" / first / "job.json").read_bytes())
        document["config"] = json.loads(spec)["config"]
        for number in range(ended + ending):
            new = f"ftjob-{random.getrandbits(120):030x}"
            db.execute(
                f"INSERT INTO jobs(id,{','.join(columns)}) SELECT ?,{','.join(columns)} FROM jobs WHERE id=?",
                (new, first),
            )
            db.execute(
                f"INSERT INTO events(id,job_id,{','.join(events)})"
                f" SELECT 'ftevent-'||lower(hex(randomblob(12))),?,{','.join(events)} FROM events"
                " WHERE job_id=? AND seq<=?",
                (new, first, 1000 if number < ended else 2),
            )
            if number >= ended:
                sql = (
                    "UPDATE jobs SET status='queued', attempt=0, finished_at=NULL, fine_tuned_model=NULL,"
                    " trained_tokens=NULL, result_files='[]', progress=0, offset=0, turn=0, waited=0 WHERE id=?"
                )
                db.execute(sql, (new,))
                folder = root / "data" / "jobs" / new
                folder.mkdir()
                (folder / "job.json").write_text(json.dumps({**document, "job_id": new}))
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def read(root: Path, sql: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"file:{root / 'data' / 'arbor.db'}?mode=ro", uri=True) as db:
        return db.execute(sql).fetchall()


def started(root: Path) -> int:
    return int(read(root, "SELECT coalesce(max(turn),0) FROM jobs")[0][0])


def running(root: Path) -> int:
    return int(read(root, "SELECT count(*) FROM jobs WHERE status='running'")[0][0])


def database_mb(root: Path) -> float:
    return float(sum(path.stat().st_size for path in (root / "data").glob("arbor.db*")) / 1e6)


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def client(
    session: aiohttp.ClientSession,
    file: str,
    seconds: float,
    ids: list[str],
    end: float,
    times: dict[str, list[float]],
) -> None:
    """One request a second, at random moments, until it is time."""
    await asyncio.sleep(random.random())
    while time.monotonic() < end:
        what = random.choices(("retrieve", "list", "create", "health"), (60, 15, 15, 10))[0]
        began = time.perf_counter()
        if what == "retrieve":
            request = session.get(f"{JOBS}/{random.choice(ids)}")
        elif what == "health":
            request = session.get("/health")
        elif what == "list":
            request = session.get(JOBS, params={"limit": "20"})
        else:
            request = session.post(JOBS, json=body(file, seconds))
        async with request as answer:
            said = await answer.json()
            if answer.status != 200:
                raise RuntimeError(f"{what}: {answer.status} {said}")
        times[what].append(time.perf_counter() - began)
        await asyncio.sleep(random.expovariate(1.0))


async def clients(url: str, file: str, seconds: float, ids: list[str], duration: float) -> dict[str, Any]:
    """What a hundred clients see."""
    times: dict[str, list[float]] = defaultdict(list)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        end = time.monotonic() + duration
        await asyncio.gather(*(client(session, file, seconds, ids, end, times) for _ in range(CLIENTS)))
    return {
        what: {
            "requests": len(taken),
            "p50_ms": 1e3 * statistics.median(taken),
            "p99_ms": 1e3 * statistics.quantiles(taken, n=100)[98],
        }
        for what, taken in times.items()
    }


async def quiet(root: Path, scale: Scale, file: str) -> dict[str, Any]:
    """A hundred clients, and no jobs but theirs."""
    ids = [row[0] for row in read(root, "SELECT id FROM jobs")]
    with serving(root, scale) as (url, pid):
        memory = memory_mb(pid, "VmRSS")
        return {"rss_mb_at_start": memory, **await clients(url, file, 0.1, ids, scale.seconds / 3)}


async def busy(root: Path, scale: Scale, file: str, seconds: float) -> dict[str, Any]:
    """A hundred clients while all devices are busy."""
    figures: dict[str, Any] = {}
    with serving(root, scale) as (url, pid):
        figures["rss_mb_at_start"] = memory_mb(pid, "VmRSS")
        await until(lambda: running(root) >= 0.6 * scale.devices)
        ids = [row[0] for row in read(root, "SELECT id FROM jobs")]
        before, began, cpu = started(root), time.monotonic(), cpu_seconds(pid)
        figures |= await clients(url, file, seconds, ids, scale.seconds)
        took = time.monotonic() - began
        figures["starts_per_second"] = (started(root) - before) / took
        figures["cores"] = (cpu_seconds(pid) - cpu) / took
        figures["running"] = running(root)
        figures["rss_mb_at_end"] = memory_mb(pid, "VmRSS")
    return figures


async def rate(root: Path, scale: Scale) -> float:
    """Attempts started a second, of jobs that take no time."""
    with serving(root, scale) as (url, _):
        await first_job(url, 0.0)
    store(root, 0, scale.jobs // 10 + 200)
    with serving(root, scale):
        await until(lambda: started(root) >= 50)  # not the server's own start
        before, began = started(root), time.monotonic()
        await until(lambda: started(root) >= scale.jobs // 10 + 150)
        return (started(root) - before) / (time.monotonic() - began)


async def until(true: Callable[[], bool], seconds: float = 90) -> None:
    """Wait for something that nobody tells."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server is too slow: nothing came of {true.__qualname__} in {seconds} s")
        await asyncio.sleep(0.05)


async def measured(scale: Scale, root: Path) -> dict[str, Any]:
    seconds = scale.devices / STARTS
    with serving(root / "busy", scale) as (url, pid):
        file = await first_job(url, 0.1)
        empty = memory_mb(pid, "VmRSS")
    sizes = [database_mb(root / "busy")]
    with sqlite3.connect(root / "busy" / "data" / "arbor.db") as db:
        db.execute("UPDATE jobs SET spec=json_set(spec,'$.config.step_seconds',?)", (seconds / 4,))
    half = (scale.jobs - scale.ending) // 2
    for _ in range(2):
        store(root / "busy", half, 0)
        sizes.append(database_mb(root / "busy"))
    figures: dict[str, Any] = {
        "jobs": scale.jobs,
        "devices": scale.devices,
        "rss_mb_empty": empty,
        "database_mb": sizes,
    }
    figures["quiet"] = await quiet(root / "busy", scale, file)
    store(root / "busy", 0, scale.ending)
    return {
        **figures,
        "database_growth": (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]),
        "busy": await busy(root / "busy", scale, file, seconds),
        "rate": {"starts_per_second": await rate(root / "rate", scale)},
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 2) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="The limits of the server, found by simulation.")
    parser.add_argument("--full", action="store_true", help="20,000 jobs and 1,000 devices")
    parser.add_argument("--dir", help="where the storage directory is made; the default is the system's")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        figures = asyncio.run(measured(FULL if given.full else SMALL, Path(folder)))
    print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
