"""What GRPO's routes do, whatever their paths: jobs begin, take groups, are waited for, and end. Without HTTP."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from arbor_core import Accepted, ConfigError, Group, Services
from arbor_core.http import UNNUMBERED, ApiError, LongPoll, RolloutSession

from . import requests
from .groups import digest_of, group_of
from .initialize import METHOD, translate, with_clients_path
from .requests import JobRequest
from .rewards import group_by_ids
from .status import ENDED, GRPOStatus, StepAnswer, Style, check_takes_groups, is_news, status_of, step_answer

CHECKPOINT_SECONDS = 300.0
END_SECONDS = 60.0
"""How long `terminate` and `cancel` wait for the job to end before they answer all the same."""
LOOK_SECONDS = 0.1
LATEST_SECONDS = 0.25
"""Between two looks for clients that wait, if nothing of the job changes: a group that another client sends changes
nothing of it."""


class Calls:
    """The jobs of a server, for GRPO's clients.

    Args:
        services: The server's.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self.polls = LongPoll(self.look, is_news, services.changed, LATEST_SECONDS)

    async def status(self, job: dict[str, Any], owner: str, style: Style = "records") -> GRPOStatus:
        return await status_of(self.services, job, owner, style)

    async def look(self, job_id: str, owner: str, style: Style) -> GRPOStatus:
        return await self.status(await self.services.learner(job_id, owner), owner, style)

    async def wait_for_change(self, body: requests.StatusRequest, job_id: str, owner: str, style: Style) -> GRPOStatus:
        """The state, once there is something that the caller does not know, or `wait` seconds have passed."""
        known, until = set(body.known), time.monotonic() + body.wait
        before = await self.look(job_id, owner, style)
        while before.status in ("created", "running", "paused") and known.issuperset(before.pending_batch_ids):
            if (left := until - time.monotonic()) <= 0:
                break
            now = await self.polls.next(job_id, owner, style, before, left)
            if now is None or (now.status, now.policy_version) != (before.status, before.policy_version):
                return now or await self.look(job_id, owner, style)
            before = now
        return before

    async def initialize(self, raw: dict[str, Any], owner: str) -> GRPOStatus:
        """Create a job; nothing waits for its worker or for an engine."""
        translated = translate(raw, self.services.defaults(METHOD))
        try:
            job = await self.services.create_job(translated.request, owner, translated.warnings)
        except (ConfigError, ApiError) as error:
            raise with_clients_path(error, translated.paths) from None
        return await self.status(job, owner)

    async def step(self, body: requests.StepRequest, job_id: str, owner: str, style: Style) -> StepAnswer:
        """Take a group of `num_generations`."""
        digest = digest_of(body.batch, "batch")

        async def send(live: RolloutSession, batch_id: int) -> tuple[Accepted, Group]:
            if batch_id != UNNUMBERED and (before := await live.known(batch_id, digest)):
                return before, live.group(before)
            group = group_of(body, live, batch_id, time.time())
            return await live.send(group, digest), group

        return await self.take_group(job_id, owner, style, body.batch_id, send)

    async def rewards(self, body: requests.RewardsRequest, job_id: str, owner: str) -> StepAnswer:
        """Take a group of completions by their ids."""
        digest = digest_of(body.rewards, "rewards")

        async def send(live: RolloutSession, batch_id: int) -> tuple[Accepted, Group]:
            before = await live.labelled(body.group, digest) if body.group else None
            if before is None and body.batch_id is not None:
                before = await live.known(batch_id, digest)
            if before:
                return before, live.group(before)
            group = group_by_ids(body, live, batch_id, time.time())
            return await live.send(group, digest), group

        return await self.take_group(job_id, owner, "records", body.batch_id, send)

    async def take_group(
        self,
        job_id: str,
        owner: str,
        style: Style,
        batch_id: int | None,
        send: Callable[[RolloutSession, int], Awaitable[tuple[Accepted, Group]]],
    ) -> StepAnswer:
        """Send a group to a job that takes one, and say what became of it."""
        job = await self.services.learner(job_id, owner)
        if text := check_takes_groups(self.services, job, owner):
            return step_answer(await self.status(job, owner, style), accepted=False, batch_id=batch_id, message=text)
        live = await self.services.rollouts(job_id, owner)
        if batch_id is None:
            batch_id = next(iter(live.pending()), UNNUMBERED)
        accepted, group = await send(live, batch_id)
        matched = sum(not rollout.messages for rollout in group.rollouts)
        return step_answer(
            await self.look(job_id, owner, style),
            repeated=accepted.repeated,
            batch_id=None if accepted.id == UNNUMBERED else accepted.id,
            matched=matched,
            tokenized=len(group.rollouts) - matched,
        )

    async def checkpoint(self, body: requests.CheckpointRequest, job_id: str, owner: str, style: Style) -> GRPOStatus:
        await self.services.checkpoint(job_id, owner, body.checkpoint_name, body.checked(), CHECKPOINT_SECONDS)
        status = await self.look(job_id, owner, style)
        status.last_checkpoint = body.checkpoint_name  # a name that was given again is the last one too
        return status

    async def cancel(self, job_id: str, owner: str, style: Style) -> GRPOStatus:
        """End a job at once; a second time changes nothing."""
        await self.services.learner(job_id, owner)
        await self.services.ask(job_id, owner, "cancel")
        return await self.status(await self.wait_until_ended(job_id, owner), owner, style)

    async def terminate(self, job_id: str, owner: str, style: Style) -> GRPOStatus:
        """End a job with what it has learned. One that has ended well, or was cancelled, is left as it is.

        Raises:
            ApiError: `invalid_job_state`: it has failed, so that there is no model; or it learns from a file.
        """
        job = await self.services.learner(job_id, owner)
        if job["status"] == "failed":
            check_takes_groups(self.services, job, owner)
        if job["status"] not in ENDED:
            await self.services.ask(job_id, owner, "finish")
        return await self.status(await self.wait_until_ended(job_id, owner), owner, style)

    async def wait_until_ended(self, job_id: str, owner: str) -> dict[str, Any]:
        """The job, when it has ended or a minute has passed."""
        until, number = time.monotonic() + END_SECONDS, None
        while True:
            job = await self.services.job(job_id, owner)
            if job["status"] in ENDED or time.monotonic() > until:
                return job
            number = await self.services.changed(job_id, owner, LOOK_SECONDS, number)

    def job_of(self, body: JobRequest, owner: str) -> tuple[str, Style]:
        """The job that a body names, or the newest, and how its client wants to see checkpoints."""
        return (body.job_id, "records") if body.job_id is not None else (self.services.newest(owner), "names")
