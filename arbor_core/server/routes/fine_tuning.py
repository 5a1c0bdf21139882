"""`/v1/fine_tuning/jobs`: create, list and show jobs, and ask them to pause, resume or cancel."""

from __future__ import annotations

from litestar import get, post
from litestar.handlers import HTTPRouteHandler

from arbor_core.application import objects
from arbor_core.application.idempotency import Repeatable
from arbor_core.application.requests import METADATA_PAIRS, CreateFineTuningJobRequest
from arbor_core.application.system import Arbor
from arbor_core.server import schemas
from arbor_core.server.http.auth import TRAIN, caller_of
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, body, query
from arbor_core.types import ApiError, Desired

JOBS = "/v1/fine_tuning/jobs"
JOB = JOBS + "/{job_id:str}"


@post(
    JOBS,
    operation_id="createFineTuningJob",
    status_code=200,
    opt=described("Create a fine-tuning job.", body=CreateFineTuningJobRequest, scopes=TRAIN),
)
async def create_job(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FineTuningJob:
    new = await body(request, CreateFineTuningJobRequest, arbor.settings.limits.upload_idle_seconds)
    repeatable = Repeatable.of(caller_of(request).name, new, request.headers)
    return await arbor.job_service.create(new, owner, repeatable)


@get(
    JOBS,
    operation_id="listPaginatedFineTuningJobs",
    opt=described("List jobs, newest first; metadata[KEY]=VALUE selects.", query=schemas.Page, scopes=TRAIN),
)
async def list_jobs(request: AnyRequest, arbor: Arbor, owner: str) -> objects.FineTuningJobList:
    page = query(request, schemas.Page)
    return arbor.job_service.list_jobs(owner, page.limit, page.after, metadata_filter(request))


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
    return arbor.job_service.show(arbor.job_service.find(job_id, owner))


def asks(action: str, desired: Desired, summary: str) -> HTTPRouteHandler:
    """The route `/v1/fine_tuning/jobs/{id}/ACTION`, which asks a job for something and answers with the job."""

    @post(
        f"{JOB}/{action}",
        operation_id=f"{action}FineTuningJob",
        status_code=200,
        opt=described(summary, scopes=TRAIN),
    )
    async def ask(job_id: str, arbor: Arbor, owner: str) -> objects.FineTuningJob:
        jobs = arbor.job_service
        return jobs.show(await jobs.ask(jobs.find(job_id, owner), desired))

    return ask


@get(
    JOB + "/events",
    operation_id="listFineTuningEvents",
    opt=described("List a job's events, newest first.", query=schemas.EventPage, scopes=TRAIN),
)
async def list_events(request: AnyRequest, job_id: str, arbor: Arbor, owner: str) -> objects.FineTuningJobEventList:
    job, page = arbor.job_service.find(job_id, owner), query(request, schemas.EventPage)
    return arbor.job_service.list_events(job, page.limit, page.after, superseded=page.superseded)


@get(
    JOB + "/checkpoints",
    operation_id="listFineTuningJobCheckpoints",
    opt=described("List a job's checkpoints, newest first.", query=schemas.CheckpointPage, scopes=TRAIN),
)
async def list_checkpoints(
    request: AnyRequest, job_id: str, arbor: Arbor, owner: str
) -> objects.FineTuningJobCheckpointList:
    job, page = arbor.job_service.find(job_id, owner), query(request, schemas.CheckpointPage)
    return arbor.job_service.list_checkpoints(job, page.limit, page.after)


ROUTES = [
    create_job,
    list_jobs,
    retrieve_job,
    asks("cancel", "cancel", "Cancel a job; its checkpoints stay."),
    asks("pause", "pause", "Pause a job: it writes a checkpoint and gives its devices back."),
    asks("resume", "run", "Resume a paused job from its last checkpoint."),
    list_events,
    list_checkpoints,
]
