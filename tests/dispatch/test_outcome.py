"""What the end of an attempt means for its job, without a server."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from arbor_core import ExecutorSettings
from arbor_core.builtin.executor import LocalExecutor
from arbor_core.dispatch.ingest import Ingest
from arbor_core.dispatch.observers import Observers
from arbor_core.dispatch.outcome import Outcomes
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.plugins import Plugins
from arbor_core.storage.database import Store


@pytest.mark.parametrize("missing", ["/usr/lib/python-that-is-not-there", "jobs/ftjob-1/attempts/1/worker.log"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT])
async def test_an_attempt_that_finds_no_room_to_start_is_paused(
    tmp_path: Path, plugins: Plugins, code: int, missing: str
) -> None:
    """And nobody is told a path of this machine."""
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    unused: Any = None
    ingest = Ingest(jobs, Observers(plugins), tmp_path, "arbor")
    executor = LocalExecutor(ExecutorSettings("cold", tmp_path / "run"))
    outcomes = Outcomes(jobs, unused, ingest, executor, tmp_path, unused)
    spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
    job = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    await jobs.transition(job, "queued")
    await jobs.transition(jobs.get(job.id) or job, "running", attempt=1)
    await outcomes.not_started(
        jobs.get(job.id) or job, OSError(code, os.strerror(code), str(tmp_path / missing))
    )  # an absolute one stays as it is
    found = jobs.get(job.id)
    assert found is not None
    said = [event.message for event in jobs.events(job.id, 9)] + [found.error.message if found.error else ""]
    assert any(os.strerror(code) in text for text in said)
    assert not [text for text in said if str(tmp_path) in text or "/usr" in text]
    if code == errno.ENOSPC:
        assert (found.status, found.desired, found.error) == ("paused", "pause", None)
        assert (jobs.events(job.id, 1)[0].data or {})["code"] == "insufficient_storage"
    else:
        assert found.status == "failed"
        assert found.error is not None
        assert found.error.code == "worker_not_started"
    store.close()
