"""How a job stands, in the words of GRPO's clients."""

from __future__ import annotations

import time
from typing import Any, Literal

from msgspec import Struct

from arbor_core import NamedCheckpoint, Services
from arbor_core.http import ApiError

ENDED = ("succeeded", "failed", "cancelled")
STATUS_NAMES = {"validating_files": "created", "queued": "created"}


class Groups(Struct):
    """Groups of a job. `received` and `waiting` are null when it has ended."""

    received: int | None
    handled: int
    waiting: int | None


class CheckpointRecord(Struct):
    """A checkpoint that a client has named. `checkpoint_dir` is what it is called in completions, and as the `model` of
    another job."""

    checkpoint_name: str
    checkpoint_dir: str
    global_step: int
    requested: bool
    metadata: dict[str, Any]
    timestamp: int


class JobFault(Struct):
    """Why a job has failed."""

    code: str
    message: str


class GRPOStatus(Struct, kw_only=True):
    """How a job stands. `checkpoints` holds records, or for the oldest clients the records' `checkpoint_dir`."""

    job_id: str
    status: str
    current_model: str
    checkpoints: dict[str, CheckpointRecord | str]
    last_checkpoint: str | None
    pending_batch_ids: list[int]
    policy_version: int
    groups: Groups
    error: JobFault | None = None


class StepAnswer(GRPOStatus, kw_only=True):
    """What became of a group: how many of its rollouts are the tokens that were sampled, and how many are text."""

    accepted: bool = True
    """False: the job has made all its steps, and did not use the group."""
    repeated: bool = False
    batch_id: int | None = None
    matched: int | None = None
    """Null where the group was not used."""
    tokenized: int | None = None
    message: str | None = None


Style = Literal["records", "names"]


async def status_of(services: Services, job: dict[str, Any], owner: str, style: Style = "records") -> GRPOStatus:
    """The state of a job of the owner's.

    Args:
        job: The job object.
        style: What clients of this route expect for each checkpoint.
    """
    live = None
    if job["status"] not in ENDED:
        try:
            live = await services.rollouts(job["id"], owner)
        except ApiError:
            job = await services.job(job["id"], owner)
            if job["status"] not in ENDED:  # it did not end meanwhile
                raise
    named = services.checkpoints(job["id"], owner)
    policy = services.policy(job["id"], owner)
    received, pending = (live.received, live.pending()) if live else (None, [fresh_id()])
    error = job["error"]
    return GRPOStatus(
        job_id=job["id"],
        status=STATUS_NAMES.get(job["status"], job["status"]),
        current_model=job["id"],
        checkpoints={one.name: record(one) if style == "records" else one.model for one in named},
        last_checkpoint=named[-1].name if named else None,
        pending_batch_ids=pending,
        policy_version=policy.version,
        groups=Groups(received, policy.handled, None if received is None else received - policy.handled),
        error=JobFault(error["code"], error["message"]) if error else None,
    )


def is_news(before: GRPOStatus, now: GRPOStatus) -> bool:
    """Whether a client that waits, and knows how the job was, is answered."""
    names = ("status", "policy_version", "pending_batch_ids")
    return any(getattr(now, name) != getattr(before, name) for name in names)


def fresh_id() -> int:
    """A batch id that a job which has ended never offered: a client that waits for one comes, and hears of the end.

    Clients remember which ids they have used and wait for another one, so that each must be new; the time in
    milliseconds is, also after a restart, and is far above any id that a job ever offers.
    """
    return time.time_ns() // 1_000_000


def record(one: NamedCheckpoint) -> CheckpointRecord:
    return CheckpointRecord(one.name, one.model, one.step, True, one.metadata, one.created_at)


def step_answer(status: GRPOStatus, **values: Any) -> StepAnswer:
    """A status with what became of a group."""
    return StepAnswer(**{name: getattr(status, name) for name in status.__struct_fields__}, **values)


def check_takes_groups(services: Services, job: dict[str, Any], owner: str) -> str | None:
    """Whether a job takes groups: None, or the message for a group that comes after its last step.

    Raises:
        ApiError: `invalid_job_state`: it was terminated, cancelled, or has failed.
    """
    job_id, status = job["id"], job["status"]
    desired = services.desired(job_id, owner)
    why = None
    if status == "failed":
        why = f"it has failed: {job['error']['message'] if job['error'] else 'for an unknown reason'}"
    elif status == "cancelled" or desired == "cancel":
        why = "it was cancelled"
    elif desired == "finish":
        why = "it was terminated"
    if why:
        raise ApiError(400, f"Job {job_id} takes no rollouts: {why}.", "invalid_job_state", "job_id")
    return "The job has made all its steps (max_steps): this group was not used." if status == "succeeded" else None
