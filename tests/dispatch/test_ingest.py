"""What attempts write, taken into the database, without a server."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from arbor_core.dispatch import ingest
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.observers import Observers
from arbor_core.jobs.policies import named_checkpoints, newest_policy
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.plugins import Plugins
from arbor_core.storage.database import Store
from arbor_core.types import Policy


async def test_any_number_of_events_is_taken(tmp_path: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "BATCH", 1)
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    collecting = Ingest(jobs, Observers(plugins), tmp_path, "arbor")
    spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
    job = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    count = 1 + sys.getrecursionlimit()
    collecting.attempt_dir(job).path.mkdir(parents=True)
    collecting.attempt_dir(job).events.write_bytes(b'{"type":"message","message":"again"}\n' * count)
    await collecting.collect(job)
    assert sum(event.message == "again" for event in jobs.events(job.id, 9999)) == count
    store.close()


async def test_what_an_attempt_of_an_earlier_version_writes_is_taken(tmp_path: Path, plugins: Plugins) -> None:
    """Its job may be running while the server is upgraded."""
    store = Store(tmp_path / "arbor.db")
    jobs, published = Jobs(store), []
    collecting = Ingest(jobs, Observers(plugins), tmp_path, "arbor", published.append)
    spec = JobSpec("t", "reinforcement", {}, model="m", model_path="m", seed=1, input="rollouts")
    job = await jobs.create(NewJob("me", "", None, None, {"n_epochs": "auto"}, spec))
    metrics = {"train_loss": 0.5, "step": 1, "total_steps": 9, "fed": {"end": 8, "groups": [[0, 7]], "skipped": []}}
    lines = [
        {"type": "resolved", "data": {"n_epochs": 3}},
        {"type": "weights", "message": "Policy version 1 published", "step": 1}
        | {"data": {"dir": "1-1", "version": 1, "handled": 1}},
        {"type": "metrics", "message": "Step 1/9", "step": 1, "data": metrics},
        {"type": "checkpoint", "step": 1, "data": {"dir": "1-1", "metrics": {}, "name": "best", "metadata": {"a": 1}}},
        {"type": "weights", "message": "2 groups handled", "data": {"handled": 2}},
        {"type": "frobnicated"},
        {"type": "message", "message": "last"},
    ]
    collecting.attempt_dir(job).path.mkdir(parents=True)
    collecting.attempt_dir(job).events.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    job = await collecting.collect(job)
    assert published == [job.id]
    assert newest_policy(store, job.id) == (Policy(version=1, handled=2), "1-1")
    assert job.hyperparameters == {"n_epochs": 3}
    assert [(one.name, one.step, one.metadata) for one in named_checkpoints(store, job.id)] == [("best", 1, {"a": 1})]
    taken = jobs.events(job.id, 4)[::-1]
    assert taken[0].data == metrics
    assert "'frobnicated'" in taken[2].message
    assert taken[3].message == "last"
    store.close()
