"""`/v1/arbor/jobs/{id}/samples`: what a job's policy has sampled, and how it was scored."""

from __future__ import annotations

from litestar import get

from arbor_core.application.samples import SampleFilter, SampleList
from arbor_core.application.system import Arbor
from arbor_core.server import schemas
from arbor_core.server.http.auth import TRAIN
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, query


@get(
    "/v1/arbor/jobs/{job_id:str}/samples",
    operation_id="listSamples",
    opt=described(
        "List the rollouts that a job was trained on or has skipped, newest first.",
        query=schemas.SamplePage,
        scopes=TRAIN,
    ),
)
async def list_samples(request: AnyRequest, job_id: str, arbor: Arbor, owner: str) -> SampleList:
    job, page = arbor.job_service.find(job_id, owner), query(request, schemas.SamplePage)
    wanted = SampleFilter(page.step, page.min_reward, page.max_reward)
    return await arbor.job_service.list_samples(job, page.limit, page.after, wanted)


ROUTES = [list_samples]
