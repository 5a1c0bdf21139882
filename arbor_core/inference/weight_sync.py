"""Policies on their way from trainers into engines: each is loaded when it is published, and goes with its job."""

from __future__ import annotations

import asyncio

from arbor_core.jobdir.cleanup import LIVE, forget_rollouts
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.repository import Jobs
from arbor_core.models.fine_tuned import FineTunedModels, Resolved
from arbor_core.types import ApiError, MessageEvent

from .engines import Engines
from .served_model import ServedModel


class WeightSync:
    """The policies of the jobs that learn from rollouts now."""

    def __init__(self, fine_tuned: FineTunedModels, engines: Engines, jobs: Jobs) -> None:
        self.fine_tuned, self.engines, self.jobs = fine_tuned, engines, jobs
        self.ended: set[str] = set()
        """Jobs that have ended and whose files go as soon as no engine has their policies."""
        self.learning: set[str] = set()
        """Jobs that had not ended at the last `tick`."""
        self.newest = 0
        """The newest of them, by its `seq`; a server that starts looks at all."""

    def published(self, job_id: str) -> None:
        """Load a job's newest policy, in the background."""
        self.engines.later(self._load(job_id))

    async def _load(self, job_id: str) -> None:
        policy = self.fine_tuned.current(job_id)
        if policy is None:
            return
        try:
            await self.refresh(policy)
        except ApiError as error:
            if self.fine_tuned.current(job_id) != policy:
                return  # a newer one speaks for itself, and these weights may have gone
            message = f"Policy version {policy.version} cannot be served: {error}"
            await self.jobs.add_event(MessageEvent(message, "error"), job_id)

    async def refresh(self, policy: Resolved) -> None:
        """Load a policy into each engine that runs for it: no request has to wait for it then.

        Raises:
            ApiError: it cannot be loaded. The one before is not served in its place.
        """
        if policy.full:
            self.engines.recover(policy)  # the reason of a failure was of other weights
        replicas = self.engines.replicas(policy)
        loaded = await asyncio.gather(*(self._load_into(model, policy) for model in replicas), return_exceptions=True)
        failures = [error for error in loaded if isinstance(error, BaseException)]
        if failures and policy.full:
            async with self.engines.using(policy):  # another engine, which begins with these weights
                return
        if failures:
            raise failures[0]

    async def _load_into(self, model: ServedModel, policy: Resolved) -> None:
        async with self.engines.using_one(model, policy):
            return

    def loaded(self) -> set[str]:
        """The jobs whose policies are in engines."""
        models = self.engines.models.values()
        owners = {one.key.name for one in models if one.full}
        return owners | {policy.live for one in models for policy in one.adapters.policies.values() if policy.live}

    async def tick(self) -> None:
        """Unload what belongs to jobs that have ended, where nobody runs on it. Their files go a tick later: who asked
        just before the end has been answered then. To be called every few seconds."""
        for job_id in self.loaded():
            if self.fine_tuned.current(job_id) is not None:
                continue
            for model in list(self.engines.models.values()):
                model.adapters.retire(job_id)
                if model.full and model.key.name == job_id and model.idle:
                    await self.engines.stop(model, "job_ended")
        for job_id in self.ended - self.loaded():
            await asyncio.to_thread(forget_rollouts, JobDir.of(self.fine_tuned.root, job_id))
            self.ended.remove(job_id)
        await asyncio.to_thread(self._look)

    def _look(self) -> None:
        """Find the jobs that have ended since the last time; by their numbers, because clocks can be set back."""
        for seq, job_id in self.jobs.live_jobs_after(self.newest):
            self.newest = seq
            self.learning.add(job_id)
        ended = self.jobs.ended(self.learning)
        self.learning -= ended
        folders = {job_id: JobDir.of(self.fine_tuned.root, job_id).path for job_id in ended}
        self.ended |= {job_id for job_id, folder in folders.items() if any((folder / name).exists() for name in LIVE)}
