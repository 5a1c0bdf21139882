"""What can be done with a job: create it, find it, show it, ask something of it. Works without HTTP."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from arbor_core import ids
from arbor_core.jobs.records import Job
from arbor_core.types import TERMINAL, ApiError, Desired, not_found

from . import objects
from .idempotency import Repeatable, RepeatedError
from .submission import CreateFineTuningJobRequest, check_again, prepare
from .system import Arbor


def found(arbor: Arbor, job_id: str, owner: str) -> Job:
    """A job of the caller's.

    Raises:
        ApiError: 404.
    """
    job = arbor.jobs.get(ids.require(job_id, "fine tune", *MISSING), owner)
    if job is None:
        raise not_found("fine tune", job_id, *MISSING)
    return job


MISSING = ("fine_tune_not_found", "fine_tune_id")


def shown(arbor: Arbor, job: Job) -> objects.FineTuningJob:
    return objects.job_object(job, arbor.settings.organization)


async def submit(
    arbor: Arbor,
    request: CreateFineTuningJobRequest,
    owner: str,
    sent: Repeatable | None = None,
    remarks: Sequence[str] = (),
) -> objects.FineTuningJob:
    """Create a job; it is in the database when this returns.

    Args:
        sent: How the request was sent, to answer one that came before as it was answered then.
        remarks: What its author should be warned of besides.
    """
    if sent and (before := sent.answered(arbor.store.one)):
        return as_answered(before)
    new, warnings = prepare(arbor, request, owner)

    def note(db: sqlite3.Connection, job: Job) -> None:
        if sent:
            sent.remember(db, msgspec.json.encode(shown(arbor, job)))
        check_again(arbor, request, owner, rollouts=job.spec.rollouts)

    try:
        job = await arbor.jobs.create(new, [*warnings, *remarks], note)
    except RepeatedError as error:
        return as_answered(error.response)
    arbor.dispatcher.wake()
    return shown(arbor, job)


def as_answered(response: bytes) -> objects.FineTuningJob:
    return msgspec.json.decode(response, type=objects.FineTuningJob)


async def ask(arbor: Arbor, job: Job, desired: Desired) -> Job:
    """Set what is wanted of a job; one that no process works on is there at once.

    Raises:
        ApiError: the job has ended otherwise.
    """
    if desired == "cancel" and job.status == "cancelled":
        return job
    if job.status in TERMINAL:
        word = {"cancel": "cancelled", "pause": "paused", "run": "resumed"}.get(desired, desired)
        message = f"Job {job.id} cannot be {word}: it has {job.status}."
        raise ApiError(400, message, "invalid_job_state")
    asked = await arbor.jobs.set_desired(job.id, desired) or job
    if asked.status in ("queued", "paused") or (asked.desired == "cancel" and asked.status == "validating_files"):
        await arbor.dispatcher.settle_idle(asked)
    arbor.dispatcher.wake(job.id)
    return arbor.jobs.get(job.id) or asked
