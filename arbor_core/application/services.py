"""What plugins' routes may use of the server (`arbor_core.types.Services`)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.jobdir import checkpoint_requests
from arbor_core.jobs.policies import named_checkpoint_sizes, named_checkpoints, newest_policy
from arbor_core.jobs.records import Job
from arbor_core.models.catalog import strip_provider
from arbor_core.process.wakeup import wake
from arbor_core.types import (
    NO_RETRY,
    TERMINAL,
    ApiError,
    CheckpointRequest,
    CommandSession,
    Desired,
    InputKind,
    NamedCheckpoint,
    Policy,
    RolloutSession,
)

from . import objects
from .system import Arbor

POLL_SECONDS = 0.2
EVENTS = 500
"""Events of a job that are in memory at once for somebody who follows it."""
INPUTS: dict[InputKind, str] = {"file": "a file", "rollouts": "rollouts", "commands": "commands"}
"""What a job learns from, in words."""
MAX_NAMED, MAX_METADATA_BYTES = 256, 1 << 20
"""Named checkpoints of a job, and bytes of JSON that are kept with all of them: each status shows them all."""


class ServerServices:
    """Jobs, for plugins: with the same checks and the same objects as over HTTP."""

    def __init__(self, arbor: Arbor) -> None:
        self.arbor, self.jobs = arbor, arbor.job_service

    async def create_job(self, request: Mapping[str, Any], owner: str, warnings: Sequence[str] = ()) -> dict[str, Any]:
        return plain(await self.jobs.create(request, owner, warnings=warnings))

    def defaults(self, method: str) -> Mapping[str, Any]:
        return self.arbor.trainers[self.arbor.plugins.trainer_for(method, self.arbor.default_trainer)].values

    def newest(self, owner: str) -> str:
        if job_id := self.arbor.jobs.newest_rollout_job(owner):
            return job_id
        raise ApiError(400, "There is no job that learns from rollouts: initialize one.", "invalid_job_state", "job_id")

    async def job(self, job_id: str, owner: str) -> dict[str, Any]:
        return plain(self.jobs.show(self.jobs.find(job_id, owner)))

    async def learner(self, job_id: str, owner: str) -> dict[str, Any]:
        return plain(self.jobs.show(self._learner(job_id, owner)))

    def _learner(self, job_id: str, owner: str, *inputs: InputKind) -> Job:
        """A job that learns from what clients send, of these kinds (default: rollouts).

        Raises:
            ApiError: 404: there is none; 400: it learns from something else.
        """
        job = self.jobs.find(job_id, owner)
        if job.spec.input in (inputs or ("rollouts",)):
            return job
        wanted, found = " or ".join(inputs or ("rollouts",)), INPUTS[job.spec.input]
        message = f"Job {job_id} is not a job that learns from {wanted}: it learns from {found}."
        raise ApiError(400, message, "invalid_job_state", "job_id")

    def _live(self, job_id: str, owner: str) -> Job:
        """A job that learns from what clients send.

        Raises:
            ApiError: 404: there is none; 400: it learns from a file.
        """
        return self._learner(job_id, owner, "rollouts", "commands")

    async def events(self, job_id: str, owner: str) -> AsyncIterator[dict[str, Any]]:
        seen, number = 0, self.arbor.jobs.feed.newest
        while True:
            ended = self.jobs.find(job_id, owner).status in TERMINAL  # before the events: after its end come no more
            while rows := self.arbor.jobs.events_after(job_id, seen, EVENTS):
                for row in rows:
                    yield plain(objects.event_object(row))
                    seen = row.seq
            if ended:
                return
            number = await self.changed(job_id, owner, POLL_SECONDS, number)

    async def changed(self, job_id: str, owner: str, seconds: float, after: int | None = None) -> int:
        feed, job = self.arbor.jobs.feed, self.jobs.find(job_id, owner)
        await feed.wait(feed.newest if after is None else after, seconds, job.id)
        return feed.newest

    async def ask(self, job_id: str, owner: str, desired: Desired) -> dict[str, Any]:
        find = self._live if desired == "finish" else self.jobs.find
        job = find(job_id, owner)
        return plain(self.jobs.show(await self.jobs.ask(job, desired)))

    def desired(self, job_id: str, owner: str) -> Desired:
        return self.jobs.find(job_id, owner).desired

    async def rollouts(self, job_id: str, owner: str) -> RolloutSession:
        if session := await self.arbor.sessions.of(self._learner(job_id, owner)):
            return session
        message = f"Job {job_id} takes no rollouts: it has ended ({self.jobs.find(job_id, owner).status})."
        raise ApiError(400, message, "invalid_job_state", "job_id")

    async def commands(self, job_id: str, owner: str) -> CommandSession:
        return await self.arbor.command_sessions.of(self._learner(job_id, owner, "commands"))

    def policy(self, job_id: str, owner: str) -> Policy:
        return newest_policy(self.arbor.store, self.jobs.find(job_id, owner).id)[0]

    async def checkpoint(
        self, job_id: str, owner: str, name: str, metadata: Mapping[str, Any], seconds: float
    ) -> NamedCheckpoint:
        job, request = self._live(job_id, owner), CheckpointRequest(name, dict(metadata))
        checkpoint_requests.check(request)
        self._check_room(job, request)
        until = time.monotonic() + seconds
        number = self.arbor.jobs.feed.newest
        pending = None if job.status == "succeeded" else self._ask_for(job, request)
        told: tuple[int, int] | None = None
        while pending and job.status != "succeeded":
            answered = not pending.exists()
            job = self.jobs.find(job_id, owner)  # before its checkpoints: after its end there are no more
            if answered or (job.status in TERMINAL and not pending.exists()):  # the answer may have come just before
                told = told or self._log_end(job)
            there = {one.name: one for one in self.checkpoints(job_id, owner)}
            if name in there and told and (job.status != "running" or (job.attempt, job.offset) >= told):
                return there[name]
            if job.status in TERMINAL - {"succeeded"}:
                message = f"Job {job_id} has ended ({job.status}): there is no checkpoint '{name}'."
                raise ApiError(400, message, "invalid_job_state", "job_id")
            if time.monotonic() > until:
                message = f"The checkpoint '{name}' was not written within {seconds:g} s; it comes when the job runs."
                raise ApiError(504, message, "checkpoint_pending", headers=NO_RETRY)
            number = await self.changed(job_id, owner, POLL_SECONDS, number)
        await self._name_last(job, request)
        return next(one for one in self.checkpoints(job_id, owner) if one.name == name)

    def _log_end(self, job: Job) -> tuple[int, int]:
        """A job's attempt, and where its log ends now: what has answered a request stands before that. Until the server
        has taken it, another checkpoint may have the name."""
        log = self.arbor.dispatcher.attempts.dir(job).attempt(job.attempt).events
        return job.attempt, log.stat().st_size if log.exists() else 0

    async def _name_last(self, job: Job, request: CheckpointRequest) -> None:
        """Give a name to the last checkpoint of a job that has succeeded."""
        last = self.arbor.jobs.checkpoints(job.id, 1)[0]
        await self.arbor.jobs.name_checkpoint(job.id, request, last)

    def _check_room(self, job: Job, request: CheckpointRequest) -> None:
        """Whether a job's status can go on to show all of its named checkpoints.

        Raises:
            ApiError: 400: there are too many, or too much is kept with them.
        """
        folder = self.arbor.dispatcher.attempts.dir(job)
        sizes = named_checkpoint_sizes(self.arbor.store, job.id) | checkpoint_requests.sizes(folder)
        sizes[request.name] = len(msgspec.json.encode(request.metadata))
        if len(sizes) > MAX_NAMED:
            message = (
                f"Invalid 'checkpoint_name': job {job.id} has {MAX_NAMED} named checkpoints. Give one of them anew."
            )
            raise ApiError(400, message, "invalid_value", "checkpoint_name")
        if sum(sizes.values()) > MAX_METADATA_BYTES:
            message = f"Invalid 'metadata': with this, more than {MAX_METADATA_BYTES} bytes are kept with job {job.id}."
            raise ApiError(400, message, "invalid_value", "metadata")

    def _ask_for(self, job: Job, request: CheckpointRequest) -> Path:
        """Write a request down; returns the file that is there until it is answered."""
        if job.status in TERMINAL:
            message = f"Job {job.id} has ended ({job.status}): it writes no more checkpoints."
            raise ApiError(400, message, "invalid_job_state", "job_id")
        folder = self.arbor.dispatcher.attempts.dir(job)
        path = checkpoint_requests.ask(folder, request)
        wake(folder.inbox_bell, "")
        return path

    def checkpoints(self, job_id: str, owner: str) -> list[NamedCheckpoint]:
        return named_checkpoints(self.arbor.store, self.jobs.find(job_id, owner).id)

    async def warm(self, model: str, owner: str) -> None:
        name = strip_provider(model)
        async with self.arbor.engines.using(self.arbor.models.resolve(name, owner)):
            pass


def plain(value: msgspec.Struct) -> dict[str, Any]:
    return dict(msgspec.to_builtins(value))
