"""The sampled rollouts of a job as pages, newest first."""

from __future__ import annotations

import asyncio
import math
import re
from itertools import islice
from typing import Any, Literal

from msgspec import Struct

from arbor_core.jobdir.layout import JobDir
from arbor_core.jobdir.samples import Place, SampledGroup, find, newest_first
from arbor_core.types import UNNUMBERED

from .objects import position

ID = re.compile(r"sample-(\d{1,12})-(\d{1,12})-(\d{1,6})")


class Sample(Struct):
    """One rollout: what was sampled, how it was scored, and what became of it."""

    id: str
    created_at: int
    """When it was trained on or skipped, in seconds since the epoch."""
    job_id: str
    step: int | None
    """The step that it was trained in; null: it was skipped."""
    error: str | None
    """Why it was skipped."""
    policy_version: int
    """The oldest that sampled any of its group."""
    batch_id: int | None
    group: str | None
    """The client's name for its group."""
    group_size: int
    """Rollouts of its group. Of large groups not all are kept."""
    trajectory: int
    prompt: str | list[dict[str, Any]]
    completion: str | dict[str, Any]
    cut: bool
    """The prompt or the completion is longer than what is shown."""
    reward: float | None
    advantage: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    truncated: bool
    """It ended because it was long enough."""
    completion_ids: list[str]
    """The chat completions that it was made of."""
    object: Literal["arbor.sample"] = "arbor.sample"


class SampleList(Struct):
    data: list[Sample]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class SampleFilter(Struct, frozen=True):
    """Which samples are wanted; None: whatever it is."""

    step: int | None = None
    """Trained in this step."""
    min_reward: float | None = None
    max_reward: float | None = None

    def takes(self, sample: Sample) -> bool:
        if self.min_reward is None and self.max_reward is None:
            return True
        low, high = (-math.inf if self.min_reward is None else self.min_reward), self.max_reward
        return sample.reward is not None and low <= sample.reward <= (math.inf if high is None else high)


ALL = SampleFilter()


async def list_samples(job: JobDir, limit: int, after: str | None = None, wanted: SampleFilter = ALL) -> SampleList:
    """A page of a job's samples. A job that learns from files has answers to its probes, if any.

    Args:
        after: The id of the last one of the page before.

    Raises:
        ApiError: `after` is none of the job's.
    """

    def read() -> list[Sample]:
        begin = position(after, lambda id: place(job, id))  # noqa: A006
        rows = newest_first(job.samples, begin, wanted.step)
        shown = (sample_object(job.path.name, where, group) for where, group in rows)
        return list(islice(filter(wanted.takes, shown), limit + 1))

    found = await asyncio.to_thread(read)
    data = found[:limit]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return SampleList(data, first, last, has_more=len(found) > limit)


def place(job: JobDir, id: str) -> Place | None:
    """Where a sample stands that a page ended with; None: it is none of the job's."""
    match = ID.fullmatch(id)
    return find(job.samples, Place(*map(int, match.groups()))) if match else None


def sample_object(job_id: str, where: Place, group: SampledGroup) -> Sample:
    rollout = group.rollouts[where.rollout]
    prompt, completion = group.prompts[rollout.prompt], rollout.completion
    return Sample(
        id=f"sample-{where.segment}-{where.offset}-{where.rollout}",
        created_at=int(group.at),
        job_id=job_id,
        step=group.step or None,
        error=group.error,
        policy_version=group.version,
        batch_id=None if group.id == UNNUMBERED else group.id,
        group=group.label,
        group_size=group.size,
        trajectory=rollout.trajectory,
        prompt=prompt,
        completion=completion,
        cut=rollout.cut,
        reward=rollout.reward,
        advantage=rollout.advantage,
        prompt_tokens=rollout.prompt_tokens,
        completion_tokens=rollout.completion_tokens,
        truncated=rollout.truncated,
        completion_ids=list(rollout.completions),
    )
