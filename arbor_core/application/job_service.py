"""Fine-tuning jobs without HTTP: create them, find, list and show them, ask them to pause, resume, finish or cancel.

Routes and plugins use it alike, and so does whoever has a server's parts in their own process. A job of another owner
does not exist for the caller: 404.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from arbor_core import ids
from arbor_core.config.api_keys import DEFAULT_OWNER
from arbor_core.config.convert import typed
from arbor_core.dispatch.dispatcher import Dispatcher
from arbor_core.jobs.feed import KEPT, Changes, GapError
from arbor_core.jobs.records import Job
from arbor_core.jobs.repository import Jobs
from arbor_core.storage.database import Store
from arbor_core.types import NO_RETRY, TERMINAL, ApiError, Desired, not_found

from . import objects, samples
from .idempotency import Repeatable, RepeatedError
from .requests import CreateFineTuningJobRequest
from .submission import Submission

NOT_FOUND = ("fine_tune_not_found", "fine_tune_id")
"""OpenAI's code and parameter."""
LOOK_SECONDS = 1.0
"""How often a wait for a job looks by itself."""
PARTICIPLES = {"cancel": "cancelled", "pause": "paused", "run": "resumed"}


class JobService:
    """The jobs of a server.

    Args:
        organization: What `organization_id` of a job object says.
    """

    def __init__(
        self, store: Store, jobs: Jobs, submission: Submission, dispatcher: Dispatcher, organization: str
    ) -> None:
        self.store, self.jobs, self.submission = store, jobs, submission
        self.dispatcher, self.organization = dispatcher, organization

    async def create(
        self,
        request: CreateFineTuningJobRequest | Mapping[str, Any],
        owner: str = DEFAULT_OWNER,
        repeatable: Repeatable | None = None,
        warnings: Sequence[str] = (),
    ) -> objects.FineTuningJob:
        """Create a job; it is in the database when this returns.

        Args:
            request: The body of `POST /v1/fine_tuning/jobs`.
            repeatable: How the request was sent: one that came before gets the response that it got then.
            warnings: More events to begin the job with.

        Raises:
            ApiError, ConfigError: saying which field is wrong, and how.
        """
        if isinstance(request, Mapping):
            request = typed(dict(request), CreateFineTuningJobRequest, "")
        return await self._create(request, owner, repeatable, warnings)

    async def _create(
        self, request: CreateFineTuningJobRequest, owner: str, repeatable: Repeatable | None, warnings: Sequence[str]
    ) -> objects.FineTuningJob:
        if repeatable and (response := repeatable.earlier_response(self.store.one)):
            return decoded(response)
        new, found = self.submission.prepare(request, owner)

        def in_transaction(db: sqlite3.Connection, job: Job) -> None:
            if repeatable:
                repeatable.remember(db, msgspec.json.encode(self.show(job)))
            self.submission.check_again(request, owner, job.spec.input)

        try:
            job = await self.jobs.create(new, [*found, *warnings], in_transaction)
        except RepeatedError as error:
            return decoded(error.response)
        self.dispatcher.wake()
        return self.show(job)

    def find(self, job_id: str, owner: str = DEFAULT_OWNER) -> Job:
        """A job of an owner's.

        Raises:
            ApiError: 404.
        """
        job = self.jobs.get(ids.require(job_id, "fine tune", *NOT_FOUND), owner)
        if job is None:
            raise not_found("fine tune", job_id, *NOT_FOUND)
        return job

    def show(self, job: Job) -> objects.FineTuningJob:
        """The job as OpenAI's object."""
        return objects.job_object(job, self.organization)

    async def wait(self, job_id: str, owner: str = DEFAULT_OWNER) -> objects.FineTuningJob:
        """The job when it has ended.

        Raises:
            ApiError: 404.
        """
        number = self.jobs.feed.newest  # before the first look: nothing is missed
        while (job := self.find(job_id, owner)).status not in TERMINAL:
            await self.jobs.feed.wait(number, LOOK_SECONDS, job.id)
            number = self.jobs.feed.newest
        return self.show(job)

    async def ask(self, job: Job, desired: Desired) -> Job:
        """Ask a job to run, pause, finish or cancel; one that no process works on does so at once.

        Raises:
            ApiError: the job has ended otherwise.
        """
        if desired == "cancel" and job.status == "cancelled":
            return job
        if job.status in TERMINAL:
            message = f"Job {job.id} cannot be {PARTICIPLES.get(desired, desired)}: it has {job.status}."
            raise ApiError(400, message, "invalid_job_state")
        current = await self.jobs.set_desired(job.id, desired) or job
        if current.status in ("queued", "paused") or (
            current.desired == "cancel" and current.status == "validating_files"
        ):
            await self.dispatcher.settle_idle(current)
        self.dispatcher.wake(job.id)
        return self.jobs.get(job.id) or current

    def list_jobs(
        self, owner: str, limit: int, after: str | None = None, metadata: Mapping[str, str] | str | None = ""
    ) -> objects.FineTuningJobList:
        """A page of an owner's jobs, newest first.

        Args:
            limit: Most jobs on the page.
            after: The id of the last job of the page before.
            metadata: Only jobs with these pairs; None: those without metadata; "": all.

        Raises:
            ApiError: `after` is no job of the owner's.
        """

        def seq(id: str) -> int | None:
            cursor = self.jobs.get(id, owner)
            return cursor.seq if cursor else None

        rows = self.jobs.page(owner, limit + 1, objects.position(after, seq), metadata)
        return objects.FineTuningJobList([self.show(job) for job in rows[:limit]], has_more=len(rows) > limit)

    def list_events(
        self, job: Job, limit: int, after: str | None = None, *, superseded: bool = False
    ) -> objects.FineTuningJobEventList:
        """A page of a job's events, newest first.

        Args:
            superseded: With the metrics of steps that a later attempt has made again. Without, each step is there once.

        Raises:
            ApiError: `after` is no event of the job.
        """
        before = objects.position(after, lambda event: self.jobs.event_seq(job.id, event))
        rows = self.jobs.events(job.id, limit + 1, before, superseded=superseded)
        data = [objects.event_object(row) for row in rows[:limit]]
        return objects.FineTuningJobEventList(data, has_more=len(rows) > limit)

    @property
    def newest_change(self) -> int:
        """Where to read the feed of changes from, for somebody who looks at the jobs afterwards."""
        return self.jobs.feed.newest

    async def changes(self, owner: str, after: int) -> AsyncIterator[Changes]:
        """What changes of an owner's jobs after a number, page by page, as it comes; see `jobs/feed.py`. `position` of
        the last page that was read is the number to go on from, after a restart too.

        Raises:
            ApiError: 410: what follows the number is not kept any more, or was never there. Take `newest_change`, then
                look at the jobs.
        """
        try:
            async for page in self.jobs.feed.follow(after, owner):
                yield page
        except GapError:
            message = (
                f"The changes after number {after} are gone: {KEPT} are kept. List the jobs, and read on from "
                f"{self.newest_change}."
            )
            raise ApiError(410, message, "changes_gone", "after", NO_RETRY) from None

    def list_checkpoints(self, job: Job, limit: int, after: str | None = None) -> objects.FineTuningJobCheckpointList:
        """A page of a job's checkpoints, newest first.

        Raises:
            ApiError: `after` is no checkpoint of the job.
        """

        def step(id: str) -> int | None:
            cursor = self.jobs.checkpoint(id=id)
            return cursor.step if cursor and cursor.job_id == job.id else None

        rows = self.jobs.checkpoints(job.id, limit + 1, objects.position(after, step))
        data = [objects.checkpoint_object(row) for row in rows[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return objects.FineTuningJobCheckpointList(data, first, last, has_more=len(rows) > limit)

    async def list_samples(
        self, job: Job, limit: int, after: str | None = None, wanted: samples.SampleFilter = samples.ALL
    ) -> samples.SampleList:
        """A page of a job's sampled rollouts, newest first.

        Raises:
            ApiError: `after` is none of the job's.
        """
        return await samples.list_samples(self.dispatcher.attempts.dir(job), limit, after, wanted)


def decoded(response: bytes) -> objects.FineTuningJob:
    """The job object of an earlier response."""
    return msgspec.json.decode(response, type=objects.FineTuningJob)
