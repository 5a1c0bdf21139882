"""Jobs of the mock trainer on a live server: creating one, and what the server and its database say of it."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from live import LiveServer
from waiting import state_of, until

from arbor_core.process.lifecycle import process_ref
from arbor_core.testing.invariants import check_invariants, processes


def create(server: LiveServer, rows: list[dict[str, Any]] | bytes, **options: Any) -> Any:
    """A job with these `hyperparameters` (default: five steps) and options of the client's `create`."""
    hyperparameters = options.pop("hyperparameters", {"steps": 5})
    return server.client.fine_tuning.jobs.create(
        model="mock/tiny",
        training_file=server.upload(rows),
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        **options,
    )


def train(server: LiveServer, rows: list[dict[str, Any]], **hyperparameters: Any) -> str:
    """Id of a new job with these hyperparameters."""
    return str(create(server, rows, hyperparameters=hyperparameters).id)


def events(server: LiveServer, job_id: str) -> list[Any]:
    """A job's last hundred events and more, oldest first."""
    return list(server.client.fine_tuning.jobs.list_events(job_id, limit=100))[::-1]


def messages(server: LiveServer, job_id: str) -> list[str]:
    return [event.message for event in events(server, job_id) if event.type == "message"]


def step_events(server: LiveServer, job_id: str) -> list[int]:
    """The steps that have reported metrics, oldest first."""
    return [event.data["step"] for event in events(server, job_id) if event.type == "metrics"]


def offered(server: LiveServer, job_id: str) -> dict[int, str]:
    """Model name of each checkpoint, by step."""
    page = server.client.fine_tuning.jobs.checkpoints.list(job_id)
    return {checkpoint.step_number: checkpoint.fine_tuned_model_checkpoint for checkpoint in page}


def held(server: LiveServer) -> int:
    """How many leases there are."""
    with sqlite3.connect(server.storage / "arbor.db") as db:
        return int(db.execute("SELECT count(*) FROM leases").fetchone()[0])


def lease_ends(server: LiveServer, job_id: str) -> list[str | None]:
    """Why each lease of a job on one device ended, oldest first."""
    with sqlite3.connect(server.storage / "arbor.db") as db:
        return [row[0] for row in db.execute("SELECT reason FROM lease_history WHERE owner=? ORDER BY seq", (job_id,))]


def supervisor_of(server: LiveServer, job_id: str) -> int:
    """Process id of the supervisor of a job's attempt; 0 if it has none."""
    with sqlite3.connect(server.storage / "arbor.db") as db:
        ref = db.execute("SELECT ref FROM jobs WHERE id=?", (job_id,)).fetchone()[0]
    return int(ref.split(":")[0]) if ref else 0


def awaited_supervisor(server: LiveServer, job_id: str) -> int:
    """The same, once there is one: a job is called running before. A signal to 0 would be one to all tests."""
    return int(until(lambda: supervisor_of(server, job_id)))


def hanging(step: int, **hyperparameters: Any) -> dict[str, Any]:
    """Hyperparameters of a job whose trainer stops at the end of a step until it is told to `go_on`: whatever is done
    to it meanwhile, it is there. No later attempt does it again."""
    return {**hyperparameters, "fault": "hang", "fault_step": step}


def stopped(server: LiveServer, job_id: str) -> bool:
    """Whether a process of a job stands still."""
    return any(state_of(pid) == "T" for pid in processes(server.storage / "jobs" / job_id))


def go_on(server: LiveServer, job_id: str) -> None:
    """Let the processes of a job that stand still go on."""
    for pid in processes(server.storage / "jobs" / job_id):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def standing_still(server: LiveServer, job_id: str) -> Iterator[None]:
    """A job's processes get nothing done inside the block: it cannot end before something is asked of it."""
    pids = list(processes(server.storage / "jobs" / job_id))
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def pause(server: LiveServer, job_id: str) -> None:
    """Pause a job that trains, however fast it does, and wait until it is paused."""
    client = server.new_client(_strict_response_validation=False)  # OpenAI's own type lacks "paused"
    with standing_still(server, job_id):
        client.fine_tuning.jobs.pause(job_id)
        desired = server.storage / "jobs" / job_id / "desired"
        until(lambda: desired.read_text() == "pause")
    until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "paused")


def alive(pid: int) -> bool:
    return bool(process_ref(pid))


def check_and_stop(server: LiveServer) -> None:
    """Stop a server whose jobs have ended: nothing of it is left, and the invariants hold."""
    assert server.stop() == 0
    until(lambda: not processes(server.storage))
    check_invariants(server.storage)
