"""Takes what attempts have written into the database, and tells those who wait for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.jobdir.documents import read_exit
from arbor_core.jobdir.layout import AttemptDir, JobDir
from arbor_core.jobs.records import Job
from arbor_core.jobs.repository import Jobs
from arbor_core.models.catalog import ft_name
from arbor_core.storage.background import in_thread
from arbor_core.storage.event_log import tail
from arbor_core.types import Event, Exit, JobView, PolicyPublished

from .observers import Observers

BATCH = 500
"""Events per transaction."""


class Unread(msgspec.Struct):
    """What an attempt's files say and nobody has taken yet."""

    exit: Exit | None
    """How it ended; None while its supervisor has not said so."""
    events: list[Event]
    offset: int
    """Where the next events begin."""


class Ingest:
    """The way of events into the database.

    Args:
        root: The storage directory.
        organization: Part of the names of models.
        published: Called with a job's id when its newest policy is in the database.
    """

    def __init__(
        self,
        jobs: Jobs,
        observers: Observers,
        root: Path,
        organization: str,
        published: Callable[[str], object] = lambda job_id: None,
    ) -> None:
        self.jobs, self.observers, self.root = jobs, observers, root
        self.organization, self.published = organization, published

    def attempt_dir(self, job: Job) -> AttemptDir:
        """The directory of the attempt that a job is at."""
        return JobDir.of(self.root, job.id).attempt(job.attempt)

    def read(self, job: Job) -> Unread:
        """Read what the attempt has written since the last time, `BATCH` events at most."""
        attempt = self.attempt_dir(job)
        unread = Unread(read_exit(attempt), [], job.offset)  # before the events: all that precedes it is then there
        for unread.offset, event in tail(attempt.events, job.offset):
            unread.events.append(event)
            if len(unread.events) == BATCH:
                break
        return unread

    async def take(self, job: Job, unread: Unread) -> Job:
        """Take what was read, and all that comes after it; returns the job as it is then."""
        while unread.events:
            taken = await self.jobs.ingest(job, unread.events, unread.offset, self.model_name(job))
            if taken is None:
                break
            crash_point("events.taken")
            if any(isinstance(event, PolicyPublished) for event in unread.events):
                self.published(job.id)
            for event in unread.events:
                self.observers.notify(view(job), event)
            if len(unread.events) < BATCH:
                return taken
            job = taken
            unread = await in_thread(self.read, job)
        return self.jobs.get(job.id) or job

    async def collect(self, job: Job) -> Job:
        """Take what the attempt has written since the last time; returns the job as it is then."""
        return await self.take(job, await in_thread(self.read, job))

    def model_name(self, job: Job) -> str:
        """The public name of a job's result."""
        return ft_name(job.spec.model, self.organization, job.spec.suffix, job.id)


def view(job: Job) -> JobView:
    """What observers see of a job."""
    return JobView(job.id, job.spec.trainer, job.spec.model, job.status, job.spec.config, job.metadata or {})
