"""A job's events in the database."""

from __future__ import annotations

from pathlib import Path

from arbor_core import MessageEvent
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.storage.database import Store


async def test_row_112_a_clock_that_jumps_back_reorders_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    job = await jobs.create(
        NewJob("me", "file-x", None, None, {}, JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1))
    )
    for at in (2e9, 1e9, 3e9):
        await jobs.ingest(job, [MessageEvent(f"{at:g}", at=at)], job.offset, "m")
    times = [event.created_at for event in jobs.events(job.id, 100)][::-1]
    assert times[-3:] == [2_000_000_000, 2_000_000_000, 3_000_000_000]
    assert times == sorted(times)
    store.close()
