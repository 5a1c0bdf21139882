"""The sessions of commands that a server has open, each since it was first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.records import Job
from arbor_core.types import TERMINAL

from .session import Session


def opened(task: asyncio.Task[Session]) -> Session | None:
    """The session that a task has opened; None: not yet, or it could not be."""
    return task.result() if task.done() and not task.cancelled() and not task.exception() else None


class OpenSessions:
    """The sessions of a server. `root`: its storage directory; `find`: reads a job's row."""

    def __init__(self, root: Path, find: Callable[[str], Job | None]) -> None:
        self.root, self.find = root, find
        self.by_job: dict[str, asyncio.Task[Session]] = {}

    async def of(self, job: Job) -> Session:
        """A job's session. Of a job that has ended it tells the results that are there."""
        if job.id not in self.by_job:
            opening = Session.opened(JobDir.of(self.root, job.id), lambda: self.find(job.id) or job)
            self.by_job[job.id] = asyncio.create_task(opening)
        task = self.by_job[job.id]
        try:
            return await asyncio.shield(task)
        except Exception:
            if self.by_job.get(job.id) is task and task.done():
                del self.by_job[job.id]  # the next one tries again
            raise

    def wake(self, job_id: str) -> None:
        """A job's trainer has written a result."""
        if (task := self.by_job.get(job_id)) and (session := opened(task)):
            session.woken.set()

    def close_ended(self) -> None:
        """Close the sessions of jobs that have ended and nobody waits for."""
        for job_id, task in list(self.by_job.items()):
            session, job = opened(task), self.find(job_id)
            if session and job and job.status in TERMINAL and not session.waiting:
                del self.by_job[job_id]
                session.close()
            elif task.done() and not session:  # whoever wanted it is gone
                del self.by_job[job_id]

    def close(self) -> None:
        for task in self.by_job.values():
            task.cancel()
            if session := opened(task):
                session.close()
