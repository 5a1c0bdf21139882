"""What attempts write, taken into the database, without a server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arbor_core.dispatch import ingest
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.observers import Observers
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.plugins import Plugins
from arbor_core.storage.database import Store


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
