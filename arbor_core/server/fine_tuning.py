"""/v1/fine_tuning/jobs."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec
from litestar import get, post

from arbor_core.records import Job
from arbor_core.repeats import Repeatable, RepeatedError
from arbor_core.submission import METADATA_PAIRS, CreateFineTuningJobRequest, check_again, prepare
from arbor_core.system import Arbor
from arbor_core.types import TERMINAL, Desired

from . import wire
from .auth import TRAIN, caller_of
from .document import described
from .errors import ApiError, not_found
from .request import AnyRequest, body, place, plausible, query

JOBS = "/v1/fine_tuning/jobs"
JOB = JOBS + "/{job_id:str}"


def found(arbor: Arbor, job_id: str, owner: str) -> Job:
    """A job of the caller's.

    Raises:
        ApiError: 404.
    """
    job = arbor.jobs.get(plausible(job_id, "fine tune", *MISSING), owner)
    if job is None:
        raise not_found("fine tune", job_id, *MISSING)
    return job


MISSING = ("fine_tune_not_found", "fine_tune_id")


def shown(arbor: Arbor, job: Job) -> wire.FineTuningJob:
    return wire.job_object(job, arbor.settings.organization)


async def submit(
    arbor: Arbor,
    request: CreateFineTuningJobRequest,
    owner: str,
    sent: Repeatable | None = None,
    remarks: Sequence[str] = (),
) -> wire.FineTuningJob:
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


def as_answered(response: bytes) -> wire.FineTuningJob:
    return msgspec.json.decode(response, type=wire.FineTuningJob)


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
    asked = await arbor.jobs.ask(job.id, desired) or job
    if asked.status in ("queued", "paused") or (asked.desired == "cancel" and asked.status == "validating_files"):
        await arbor.dispatcher.settle_idle(asked)
    arbor.dispatcher.wake(job.id)
    return arbor.jobs.get(job.id) or asked


@post(
    JOBS,
    operation_id="createFineTuningJob",
    status_code=200,
    opt=described("Create a fine-tuning job.", body=CreateFineTuningJobRequest, scopes=TRAIN),
)
async def create_job(request: AnyRequest, arbor: Arbor, owner: str) -> wire.FineTuningJob:
    seconds = arbor.settings.limits.upload_idle_seconds
    asked = await body(request, CreateFineTuningJobRequest, seconds)
    return await submit(arbor, asked, owner, Repeatable.of(caller_of(request).name, asked, request.headers))


@get(
    JOBS,
    operation_id="listPaginatedFineTuningJobs",
    opt=described("List jobs, newest first; metadata[KEY]=VALUE selects.", query=wire.Page, scopes=TRAIN),
)
async def list_jobs(request: AnyRequest, arbor: Arbor, owner: str) -> wire.FineTuningJobList:
    page = query(request, wire.Page)

    def seq(id: str) -> int | None:
        cursor = arbor.jobs.get(id, owner)
        return cursor.seq if cursor else None

    after = place(page.after, seq)
    jobs = arbor.jobs.page(owner, page.limit + 1, after, metadata_filter(request))
    data = [shown(arbor, job) for job in jobs[: page.limit]]
    return wire.FineTuningJobList(data, has_more=len(jobs) > page.limit)


def metadata_filter(request: AnyRequest) -> dict[str, str] | str | None:
    """`metadata[k]=v` pairs; None for `metadata=null`, "" for neither.

    Raises:
        ApiError: more pairs than a job can have.
    """
    if request.query_params.get("metadata") == "null":
        return None
    pairs = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if len(pairs) > METADATA_PAIRS:
        message = f"Invalid 'metadata': expected at most {METADATA_PAIRS} pairs, got {len(pairs)}."
        raise ApiError(400, message, "invalid_value", "metadata")
    return pairs or ""


@get(JOB, operation_id="retrieveFineTuningJob", opt=described("Retrieve a job.", scopes=TRAIN))
async def retrieve_job(job_id: str, arbor: Arbor, owner: str) -> wire.FineTuningJob:
    return shown(arbor, found(arbor, job_id, owner))


@post(
    JOB + "/cancel",
    operation_id="cancelFineTuningJob",
    status_code=200,
    opt=described("Cancel a job; its checkpoints stay.", scopes=TRAIN),
)
async def cancel_job(job_id: str, arbor: Arbor, owner: str) -> wire.FineTuningJob:
    return shown(arbor, await ask(arbor, found(arbor, job_id, owner), "cancel"))


@post(
    JOB + "/pause",
    operation_id="pauseFineTuningJob",
    status_code=200,
    opt=described("Pause a job: it writes a checkpoint and gives its devices back.", scopes=TRAIN),
)
async def pause_job(job_id: str, arbor: Arbor, owner: str) -> wire.FineTuningJob:
    return shown(arbor, await ask(arbor, found(arbor, job_id, owner), "pause"))


@post(
    JOB + "/resume",
    operation_id="resumeFineTuningJob",
    status_code=200,
    opt=described("Resume a paused job from its last checkpoint.", scopes=TRAIN),
)
async def resume_job(job_id: str, arbor: Arbor, owner: str) -> wire.FineTuningJob:
    return shown(arbor, await ask(arbor, found(arbor, job_id, owner), "run"))


@get(
    JOB + "/events",
    operation_id="listFineTuningEvents",
    opt=described("List a job's events, newest first.", query=wire.Page, scopes=TRAIN),
)
async def list_events(request: AnyRequest, job_id: str, arbor: Arbor, owner: str) -> wire.FineTuningJobEventList:
    job, page = found(arbor, job_id, owner), query(request, wire.Page)
    before = place(page.after, lambda event: arbor.jobs.event_seq(job.id, event))
    rows = arbor.jobs.events(job.id, page.limit + 1, before)
    data = [wire.event_object(row) for row in rows[: page.limit]]
    return wire.FineTuningJobEventList(data, has_more=len(rows) > page.limit)


@get(
    JOB + "/checkpoints",
    operation_id="listFineTuningJobCheckpoints",
    opt=described("List a job's checkpoints, newest first.", query=wire.CheckpointPage, scopes=TRAIN),
)
async def list_checkpoints(
    request: AnyRequest, job_id: str, arbor: Arbor, owner: str
) -> wire.FineTuningJobCheckpointList:
    job, page = found(arbor, job_id, owner), query(request, wire.CheckpointPage)

    def step(id: str) -> int | None:
        cursor = arbor.jobs.checkpoint(id=id)
        return cursor.step if cursor and cursor.job_id == job.id else None

    before = place(page.after, step)
    rows = arbor.jobs.checkpoints(job.id, page.limit + 1, before)
    data = [wire.checkpoint_object(row) for row in rows[: page.limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return wire.FineTuningJobCheckpointList(data, first, last, has_more=len(rows) > page.limit)


ROUTES = [
    create_job,
    list_jobs,
    retrieve_job,
    cancel_job,
    pause_job,
    resume_job,
    list_events,
    list_checkpoints,
]
