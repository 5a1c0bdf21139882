"""What must hold after the chaos beside `arbor_core.testing.invariants`: what clients were told, and the steps."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from http_calls import JOBS, call
from live import ENDED, LiveServer

from arbor_core.jobdir import checkpoints
from arbor_core.jobdir.cleanup import LIVE
from arbor_core.jobdir.groups import read as read_inbox
from arbor_core.process.lifecycle import lives
from arbor_core.types import ArborError
from arbor_core.worker.replay import replay

if TYPE_CHECKING:
    from chaos_rollouts import Told

Steps = dict[int, str]
FORGET_SECONDS = 120.0


@dataclass
class Ledger:
    """What the clients were told, and so must stay true."""

    jobs: dict[str, str] = field(default_factory=dict)
    """Kind of each job whose creation was acknowledged."""
    files: dict[str, bytes] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)
    """The first terminal status that was seen of a job."""
    twins: dict[str, Steps] = field(default_factory=dict)
    """By kind: what a job that nothing disturbed reported of each step."""
    faults: list[str] = field(default_factory=list)

    def saw(self, job_id: str, status: str) -> None:
        """Note a status; a terminal one must not change any more."""
        first = self.ended.get(job_id, status)
        if first != status:
            self.faults.append(f"{job_id} was {first} and is {status} now")
        if status in ENDED:
            self.ended[job_id] = status


def read(storage: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"file:{storage / 'arbor.db'}?mode=ro", uri=True) as db:
        return db.execute(sql, values).fetchall()


def metrics(storage: Path, job_id: str) -> list[dict[str, Any]]:
    sql = "SELECT data FROM events WHERE job_id=? AND type='metrics' ORDER BY seq"
    return [json.loads(data) for (data,) in read(storage, sql, job_id)]


def told(step: dict[str, Any]) -> str:
    """What a step came to: the digest of the parameters, or the loss of a trainer that has none."""
    return str(step.get("digest") or step["train_loss"])


def digests(storage: Path, job_id: str) -> Steps:
    return {step["step"]: told(step) for step in metrics(storage, job_id)}


def violations(server: LiveServer, ledger: Ledger, counts: Counter[str]) -> list[str]:
    """What does not hold while the server still runs and every job has ended."""
    storage = server.storage
    found = [*of_files(server, ledger)]
    for job_id, status in read(storage, "SELECT id, status FROM jobs"):
        counts[f"jobs {status}"] += 1
        found += of_job(storage, job_id, status, ledger, counts)
    for job_id in ledger.jobs:
        if call(server.url, "GET", f"{JOBS}/{job_id}").status != 200:
            found.append(f"{job_id} was acknowledged and does not resolve")
    return found + list(of_forgotten(storage))


def of_lesson(storage: Path, job_id: str, lesson: Told, counts: Counter[str]) -> Iterator[str]:
    """Groups that were taken are in the inbox once, named checkpoints are there, results hold what was learned."""
    records = list(read_inbox(storage / "jobs" / job_id / "inbox", 0))
    counts["groups in inboxes"] += len(records)
    ids = Counter(record.group.id for record in records)
    for batch_id, names in lesson.groups.items():
        if ids[batch_id] != 1:
            yield f"{job_id}: the group of batch {batch_id} was taken, and is in the inbox {ids[batch_id]} times"
            continue
        [record] = [record for record in records if record.group.id == batch_id]
        kept = {name for rollout in record.group.rollouts for name in rollout.completions}
        if names and kept != set(names):
            yield f"{job_id}: the group of batch {batch_id} was {sorted(names)}, and is {sorted(kept)}"
    rejected = "SELECT message FROM events WHERE job_id=? AND message LIKE '%cannot be trained on%'"
    yield from (f"{job_id}: {message}" for (message,) in read(storage, rejected, job_id))
    last = "SELECT max(c.step) FROM jobs j JOIN checkpoints c ON c.job_id=j.id WHERE j.id=? AND j.status='succeeded'"
    for (step,) in read(storage, last, job_id):
        if step is not None and step < lesson.version:
            yield f"{job_id}: version {lesson.version} of its policy was answered, and its result is of step {step}"
    for name in lesson.names:
        sql = (
            "SELECT c.dir FROM named_checkpoints n JOIN checkpoints c ON c.job_id=n.job_id AND c.step=n.step"
            " WHERE n.job_id=? AND n.name=?"
        )
        rows = read(storage, sql, job_id, name)
        if not rows:
            yield f"{job_id}: checkpoint '{name}' was acknowledged, and is gone"
            continue
        folder = storage / "jobs" / job_id / "checkpoints" / rows[0][0]
        if reason := checkpoints.fault(folder):
            yield f"{job_id}: checkpoint '{name}' in {folder.name}: {reason}"


def of_forgotten(storage: Path) -> Iterator[str]:
    """Nothing is kept that only served while jobs learned; a server removes it within two ticks."""
    deadline = time.monotonic() + FORGET_SECONDS
    while left := [str(path) for name in LIVE for path in storage.glob(f"jobs/*/{name}")]:
        if time.monotonic() > deadline:
            yield f"left of jobs that have ended: {left}"
            return
        time.sleep(0.2)


def of_replays(storage: Path, counts: Counter[str]) -> Iterator[str]:
    """What succeeded comes out the same when it is repeated from its inbox."""
    for (job_id,) in read(storage, "SELECT id FROM jobs WHERE status='succeeded'"):
        folder = storage / "jobs" / job_id
        if not (folder / "inbox").exists() or not metrics(storage, job_id):
            continue
        try:
            replay(folder, lambda _: None)
        except ArborError as error:
            yield f"{job_id}, repeated: {error}"
        counts["jobs repeated"] += 1
        counts["steps repeated"] += len(digests(storage, job_id))


def of_files(server: LiveServer, ledger: Ledger) -> Iterator[str]:
    for file_id, content in ledger.files.items():
        answer = call(server.url, "GET", f"/v1/files/{file_id}/content")
        if answer.status != 200 or answer.body != content:
            yield f"{file_id} is not what was uploaded: {answer.status}, {len(answer.body)} of {len(content)} bytes"


def of_job(storage: Path, job_id: str, status: str, ledger: Ledger, counts: Counter[str]) -> Iterator[str]:
    """Its end and its steps."""
    ledger.saw(job_id, status)
    [(attempts,)] = read(storage, "SELECT attempt FROM jobs WHERE id=?", job_id)
    live = any(name in ledger.jobs.get(job_id, "") for name in ("grpo", "_commands"))
    ended_early = not attempts and live  # before anything was learned
    allowed = ("succeeded", "cancelled") if ended_early or job_id in ledger.cancelled else ("succeeded",)
    if job_id in ledger.jobs and status not in allowed:
        [(error,)] = read(storage, "SELECT error FROM jobs WHERE id=?", job_id)
        yield f"{job_id} is {status}: {error}"
    steps = metrics(storage, job_id)
    twin = ledger.twins.get(ledger.jobs.get(job_id, ""))
    for step in steps if twin else ():
        counts["steps compared"] += 1
        if told(step) != twin[step["step"]]:  # type: ignore[index]
            yield f"{job_id}, step {step['step']}: {told(step)}, undisturbed {twin[step['step']]}"  # type: ignore[index]
    yield from of_order(storage, job_id, status, steps)
    counts["attempts"] += attempts
    if attempts > 1 and status == "succeeded":
        counts["interrupted jobs that succeeded"] += 1


def of_order(storage: Path, job_id: str, status: str, steps: list[dict[str, Any]]) -> Iterator[str]:
    """Steps go up by one; only a new attempt goes back."""
    last = 0
    for step in steps:
        if step["step"] > last + 1:
            yield f"{job_id}: step {step['step']} follows {last}"
        last = step["step"]
    if status == "succeeded" and steps and last != steps[-1]["total_steps"]:
        yield f"{job_id} succeeded at step {last} of {steps[-1]['total_steps']}"
    seen = [step["step"] for step in steps]
    restarts = sum(after <= before for before, after in pairwise(seen))
    [(attempts,)] = read(storage, "SELECT attempt FROM jobs WHERE id=?", job_id)
    if restarts >= max(1, attempts):
        yield f"{job_id} went back {restarts} times in {attempts} attempts"


def supervisors(storage: Path) -> list[int]:
    """Supervisors that live, of all attempts."""
    refs = [path.read_text() for path in storage.glob("jobs/*/attempts/*/keeper")]
    return [int(ref.partition(":")[0]) for ref in refs if lives(ref)]
