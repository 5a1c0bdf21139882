"""The states of a job in SQL, and where a job belongs that no process works on.

`types/jobs.py` says what each status means, and what can be desired of a job.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from arbor_core.types import TERMINAL, Status

from .records import Job


def _status_in(statuses: Iterable[str]) -> str:
    return f"status IN ({','.join(repr(status) for status in statuses)})"


ENDED = _status_in(status for status in get_args(Status) if status in TERMINAL)
NOT_ENDED = _status_in(status for status in get_args(Status) if status not in TERMINAL)
WAITING = _status_in(("validating_files", "queued"))
"""It waits for its first attempt, or for another one."""
VALIDATED = _status_in(("queued", "running", "paused"))
"""Its files are valid, and it has not ended."""
LIVE = "json_extract(spec,'$.input')<>'file'"
"""It learns from what clients send while it runs."""
STARTABLE = "status='queued' AND desired IN('run','finish')"
"""An attempt of it may begin."""
OUT_OF_PLACE = (
    "(status='queued' AND (desired IN('pause','cancel') OR (desired='finish' AND attempt=0)))"
    " OR (status='paused' AND desired<>'pause') OR (status='validating_files' AND desired='cancel')"
)
"""No process works on it, and it belongs in another status (`idle_target`). Word by word the condition of the index
`jobs_out_of_place`: SQLite uses that for no other."""


def idle_target(job: Job) -> Status | None:
    """The status that a job belongs in, if it has another one and no process works on it."""
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
