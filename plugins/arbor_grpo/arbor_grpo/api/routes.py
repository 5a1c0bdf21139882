"""GRPO over HTTP, in the three styles of the original's clients; see docs/grpo.md.

With `job_id` in the body (arbor-ai 0.2.5, 0.2.9 and later), with it in the path (0.2.6 to 0.2.8), and without any
(earlier ones: one job per server, here the caller's newest). Nothing waits for a worker without a bound.
"""

from __future__ import annotations

from typing import Any

from litestar import post

from arbor_core import Services
from arbor_core.http import raw_body

from . import requests
from .calls import Calls
from .requests import AnyRequest, JobRequest, read
from .status import GRPOStatus, StepAnswer

GRPO = "/v1/fine_tuning/grpo"
TRAIN, INFER = ("train",), ("infer",)


def grpo_post(path: str, operation_id: str, body: type | None = None, scopes: tuple[str, ...] = TRAIN) -> post:
    """The decorator of a handler, with what the server's OpenAPI document and its keys need to know of it: the handler
    reads its body itself."""
    opt = {"scopes": scopes} if body is None else {"body": body, "scopes": scopes, "response": None}
    return post(path, operation_id=operation_id, status_code=200, opt=opt)


def routes(services: Services) -> list[Any]:
    """The handlers."""
    calls = Calls(services)
    return [*creating(calls), *in_body(calls), *in_path(calls), *engines(services)]


def creating(calls: Calls) -> list[Any]:
    """Where a job begins, and how it stands."""

    @grpo_post(f"{GRPO}/initialize", "initializeGRPO", requests.InitializeRequest)
    async def initialize(request: AnyRequest, owner: str) -> GRPOStatus:
        """Begin to learn from rollouts."""
        return await calls.initialize(requests.decoded(await raw_body(request, requests.BODY_SECONDS, "")), owner)

    @grpo_post(f"{GRPO}/status", "getGRPOStatus", requests.StatusRequest)
    async def status(request: AnyRequest, owner: str) -> GRPOStatus:
        """How a job stands, and which batch ids are offered."""
        body = await read(request, requests.StatusRequest)
        job_id, style = calls.job_of(body, owner)
        return await calls.wait_for_change(body, job_id, owner, style)

    return [initialize, status]


def in_body(calls: Calls) -> list[Any]:
    """The routes whose body names the job."""

    @grpo_post(f"{GRPO}/step", "sendGRPOGroup", requests.StepRequest)
    async def step(request: AnyRequest, owner: str) -> StepAnswer:
        """Send a group of completions as text, with their rewards."""
        body = await read(request, requests.StepRequest)
        job_id, style = calls.job_of(body, owner)
        return await calls.step(body, job_id, owner, style)

    @grpo_post(f"{GRPO}/rewards", "sendGRPORewards", requests.RewardsRequest)
    async def rewards(request: AnyRequest, owner: str) -> StepAnswer:
        """Send a group of completions by their ids, with their rewards."""
        body = await read(request, requests.RewardsRequest)
        return await calls.rewards(body, calls.job_of(body, owner)[0], owner)

    @grpo_post(f"{GRPO}/checkpoint", "nameGRPOCheckpoint", requests.CheckpointRequest)
    async def checkpoint(request: AnyRequest, owner: str) -> GRPOStatus:
        """Write a checkpoint and give it a name."""
        body = await read(request, requests.CheckpointRequest)
        job_id, style = calls.job_of(body, owner)
        return await calls.checkpoint(body, job_id, owner, style)

    @grpo_post(f"{GRPO}/cancel", "cancelGRPO", JobRequest)
    async def cancel(request: AnyRequest, owner: str) -> GRPOStatus:
        """End a job at once."""
        job_id, style = calls.job_of(await read(request, JobRequest), owner)
        return await calls.cancel(job_id, owner, style)

    @grpo_post(f"{GRPO}/terminate", "terminateGRPO", JobRequest)
    async def terminate(request: AnyRequest, owner: str) -> GRPOStatus:
        """End a job with what it has learned."""
        job_id, style = calls.job_of(await read(request, JobRequest), owner)
        return await calls.terminate(job_id, owner, style)

    return [step, rewards, checkpoint, cancel, terminate]


def in_path(calls: Calls) -> list[Any]:
    """The routes whose path names the job."""
    job = f"{GRPO}/{{job_id:str}}"

    @grpo_post(f"{job}/step", "sendGRPOGroupTo", requests.StepRequest)
    async def step(request: AnyRequest, job_id: str, owner: str) -> StepAnswer:
        """Send a group of completions as text to the job in the path."""
        return await calls.step(await read(request, requests.StepRequest), job_id, owner, "names")

    @grpo_post(f"{job}/checkpoint", "nameGRPOCheckpointOf", requests.CheckpointRequest)
    async def checkpoint(request: AnyRequest, job_id: str, owner: str) -> GRPOStatus:
        """Write a checkpoint of the job in the path and give it a name."""
        return await calls.checkpoint(await read(request, requests.CheckpointRequest), job_id, owner, "names")

    @grpo_post(f"{job}/cancel", "cancelGRPOJob")
    async def cancel(job_id: str, owner: str) -> GRPOStatus:
        """End the job in the path at once."""
        return await calls.cancel(job_id, owner, "names")

    @grpo_post(f"{job}/terminate", "terminateGRPOJob")
    async def terminate(job_id: str, owner: str) -> GRPOStatus:
        """End the job in the path with what it has learned."""
        return await calls.terminate(job_id, owner, "names")

    return [step, checkpoint, cancel, terminate]


def engines(services: Services) -> list[Any]:
    """The original's routes for engines. Ours are started by their first request and stopped when nobody uses them."""

    @grpo_post("/v1/chat/launch", "launchEngine", requests.LaunchRequest, INFER)
    async def launch(request: AnyRequest, owner: str) -> dict[str, Any]:
        """Start the engine of a model before its first request."""
        body = await read(request, requests.LaunchRequest)
        await services.warm(body.model, owner)
        message = "The engine runs. It would have been started by the first completion too."
        return {"message": message, "job_id": f"infer:{body.model}", "model": body.model}

    @grpo_post("/v1/chat/kill", "killEngine", requests.KillRequest, INFER)
    async def kill(request: AnyRequest) -> dict[str, Any]:
        """Do nothing: engines are shared, and stop by themselves."""
        body = await read(request, requests.KillRequest)
        message = "Nothing to do: engines are shared, and one that nobody uses is stopped by the server."
        return {"message": message, "job_id": body.job_id or "*", "aliases": []}

    return [launch, kill]
