"""What is stored names no place on a machine: a storage directory can be moved."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from http_calls import call
from live import LiveServer

from arbor_core.jobdir.layout import JobDir

JOBS = "/v1/fine_tuning/jobs"
UNREAD = ("engines", "run", "lock", "worker.log")
"""What a server or a process writes for itself, and no later one reads."""


def wait(server: LiveServer, job_id: str, status: str) -> dict[str, Any]:
    """The job object, once it has a status. The stock client refuses `paused`, and jobs without a training file."""
    deadline = time.monotonic() + 120
    while (job := call(server.url, "GET", f"{JOBS}/{job_id}").json)["status"] != status:
        assert time.monotonic() < deadline, job
        time.sleep(0.03)
    return dict(job)


def chat(server: LiveServer, model: str) -> None:
    assert server.client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}]).choices


def test_nothing_that_is_stored_names_the_storage_directory(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    server = start_server(storage=tmp_path / "before")
    created = server.client.fine_tuning.jobs.create(model="mock/tiny", training_file=server.upload(chat_rows))
    first = wait(server, created.id, "succeeded")
    body = {"model": first["fine_tuned_model"], "method": {"type": "mock_grpo"}}
    learner = call(server.url, "POST", JOBS, body).json["id"]
    wait(server, learner, "running")
    assert call(server.url, "POST", f"{JOBS}/{learner}/pause").status == 200
    wait(server, learner, "paused")
    assert server.stop() == 0
    place = str(server.storage)
    for path in server.storage.rglob("*"):
        inside = path.relative_to(server.storage)
        if path.is_file() and inside.parts[0] not in UNREAD and path.name not in UNREAD:
            assert place.encode() not in path.read_bytes(), inside
    with sqlite3.connect(server.storage / "arbor.db") as db:
        assert place not in "\n".join(db.iterdump())
        [identity] = db.execute("SELECT value FROM storage WHERE key='id'").fetchone()
    documents = [
        msgspec.json.decode(JobDir.of(server.storage, job).document.read_bytes()) for job in (first["id"], learner)
    ]
    assert {document["storage"] for document in documents} == {identity}
    assert documents[1]["adapter"].startswith(f"jobs/{first['id']}/checkpoints/")

    (tmp_path / "before").rename(tmp_path / "after")
    moved = start_server(storage=tmp_path / "after")
    assert wait(moved, first["id"], "succeeded") == first
    chat(moved, first["fine_tuned_model"])
    assert call(moved.url, "POST", f"{JOBS}/{learner}/resume").status == 200
    wait(moved, learner, "running")
    chat(moved, learner)
    assert call(moved.url, "POST", f"{JOBS}/{learner}/cancel").status == 200
    wait(moved, learner, "cancelled")
