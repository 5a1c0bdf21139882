"""/v1/fine_tuning/jobs."""

from __future__ import annotations

from litestar import get, post

from arbor_core.application import objects
from arbor_core.application.idempotency import Repeatable
from arbor_core.application.job_service import ask, found, shown, submit
from arbor_core.application.submission import METADATA_PAIRS, CreateFineTuningJobRequest
from arbor_core.application.system import Arbor
from arbor_core.server import schemas
from arbor_core.server.http.auth import TRAIN, caller_of
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, body, place, query
from arbor_core.types import ApiError

JOBS = "/v1/fine_tuning/jobs"
JOB = JOBS + "/{job_id:str}"


@post(
    JOBS,
    operation_id="createFineTuningJob",
    status_code=200,
    opt=described("Create a fine-tuning job.", body=CreateFineTuningJobRequest, scopes=TRAIN),
)
async def create_job(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FineTuningJob:
    seconds = arbor.settings.limits.upload_idle_seconds
    asked = await body(request, CreateFineTuningJobRequest, seconds)
    return await submit(arbor, asked, owner, Repeatable.of(caller_of(request).name, asked, request.headers))


@get(
    JOBS,
    operation_id="listPaginatedFineTuningJobs",
    opt=described("List jobs, newest first; metadata[KEY]=VALUE selects.", query=schemas.Page, scopes=TRAIN),
)
async def list_jobs(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FineTuningJobList:
    page = query(request, schemas.Page)

    def seq(id: str) -> int | None:
        cursor = arbor.jobs.get(id, owner)
        return cursor.seq if cursor else None

    after = place(page.after, seq)
    jobs = arbor.jobs.page(owner, page.limit + 1, after, metadata_filter(request))
    data = [shown(arbor, job) for job in jobs[: page.limit]]
    return objects.FineTuningJobList(data, has_more=len(jobs) > page.limit)


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
async def retrieve_job(job_id: str, arbor: Arbor, owner: str) -> objects.FineTuningJob:
    return shown(arbor, found(arbor, job_id, owner))


@post(
    JOB + "/cancel",
    operation_id="cancelFineTuningJob",
    status_code=200,
    opt=described("Cancel a job; its checkpoints stay.", scopes=TRAIN),
)
async def cancel_job(job_id: str, arbor: Arbor, owner: str) -> objects.FineTuningJob:
    return shown(arbor, await ask(arbor, found(arbor, job_id, owner), "cancel"))


@post(
    JOB + "/pause",
    operation_id="pauseFineTuningJob",
    status_code=200,
    opt=described("Pause a job: it writes a checkpoint and gives its devices back.", scopes=TRAIN),
)
async def pause_job(job_id: str, arbor: Arbor, owner: str) -> objects.FineTuningJob:
    return shown(arbor, await ask(arbor, found(arbor, job_id, owner), "pause"))


@post(
    JOB + "/resume",
    operation_id="resumeFineTuningJob",
    status_code=200,
    opt=described("Resume a paused job from its last checkpoint.", scopes=TRAIN),
)
async def resume_job(job_id: str, arbor: Arbor, owner: str) -> objects.FineTuningJob:
    return shown(arbor, await ask(arbor, found(arbor, job_id, owner), "run"))


@get(
    JOB + "/events",
    operation_id="listFineTuningEvents",
    opt=described("List a job's events, newest first.", query=schemas.Page, scopes=TRAIN),
)
async def list_events(request: AnyRequest, job_id: str, arbor: Arbor, owner: str) -> objects.FineTuningJobEventList:
    job, page = found(arbor, job_id, owner), query(request, schemas.Page)
    before = place(page.after, lambda event: arbor.jobs.event_seq(job.id, event))
    rows = arbor.jobs.events(job.id, page.limit + 1, before)
    data = [objects.event_object(row) for row in rows[: page.limit]]
    return objects.FineTuningJobEventList(data, has_more=len(rows) > page.limit)


@get(
    JOB + "/checkpoints",
    operation_id="listFineTuningJobCheckpoints",
    opt=described("List a job's checkpoints, newest first.", query=schemas.CheckpointPage, scopes=TRAIN),
)
async def list_checkpoints(
    request: AnyRequest, job_id: str, arbor: Arbor, owner: str
) -> objects.FineTuningJobCheckpointList:
    job, page = found(arbor, job_id, owner), query(request, schemas.CheckpointPage)

    def step(id: str) -> int | None:
        cursor = arbor.jobs.checkpoint(id=id)
        return cursor.step if cursor and cursor.job_id == job.id else None

    before = place(page.after, step)
    rows = arbor.jobs.checkpoints(job.id, page.limit + 1, before)
    data = [objects.checkpoint_object(row) for row in rows[: page.limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return objects.FineTuningJobCheckpointList(data, first, last, has_more=len(rows) > page.limit)


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
