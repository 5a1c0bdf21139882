"""The states of a job: which are final, and when a job is not where it was asked to be."""

from __future__ import annotations

from arbor_core.types import Status

from .records import Job


def idle_target(job: Job) -> Status | None:
    """Where a job that no process works on should be instead, if not where it is."""
    if job.status not in ("validating_files", "queued", "paused"):
        return None
    if job.desired == "cancel" or (job.desired == "finish" and job.attempt == 0):  # nothing was trained
        return "cancelled"
    if job.desired == "finish" and job.status == "paused":
        return "queued"
    if job.desired == "pause" and job.status == "queued":
        return "paused"
    if job.desired == "run" and job.status == "paused":
        return "queued"
    return None


OUT_OF_PLACE = (
    "(status='queued' AND (desired IN('pause','cancel') OR (desired='finish' AND attempt=0)))"
    " OR (status='paused' AND desired<>'pause') OR (status='validating_files' AND desired='cancel')"
)
"""Word by word what the index `jobs_out_of_place` says."""
