"""The job queue as the scheduler sees it: which jobs may start, which run, and which must move without a process."""

from __future__ import annotations

from collections.abc import Sequence

from arbor_core.storage.database import Store
from arbor_core.types import Bundle, Claim, QueuedJob, RunningJob

from .records import Job, job_from_row
from .states import OUT_OF_PLACE, STARTABLE

SCHEDULED = (
    "SELECT id, json_extract(spec,'$.devices'), seq, priority,"
    " waited + (status='queued') * ((SELECT max(turn) FROM jobs) - turn) FROM jobs"
)
"""What the scheduler sees of a job; the last column is how many attempts of others were started while it waited."""


class JobQueue:
    """The queued and running jobs of one database."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def out_of_place(self) -> list[Job]:
        """Jobs that no process works on, and that are desired to be in another state; oldest first."""
        sql = f"SELECT * FROM jobs INDEXED BY jobs_out_of_place WHERE {OUT_OF_PLACE} ORDER BY seq"  # noqa: S608 - our words
        return [job_from_row(row) for row in self.store.read(sql)]

    def next_jobs(self, limit: int, devices: int, trainers: Sequence[str]) -> list[QueuedJob]:
        """The next jobs to start: the `limit` oldest, and the `limit` oldest of the highest priorities.

        Args:
            devices: Jobs that need more are left out.
            trainers: Jobs of other trainers are left out.
        """
        marks = ",".join("?" * len(trainers))
        sql = (
            f"{SCHEDULED} WHERE {STARTABLE} AND json_extract(spec,'$.devices')<=?"
            f" AND json_extract(spec,'$.trainer') IN ({marks}) ORDER BY %s LIMIT ?"
        )
        orders = ("seq", "priority DESC, seq")
        rows = [row for order in orders for row in self.store.read(sql % order, devices, *trainers, limit)]
        return list({job: QueuedJob(job, training_claim(job, count), *rest) for job, count, *rest in rows}.values())

    def unschedulable(self, devices: int, trainers: Sequence[str]) -> list[Job]:
        """The queued jobs that `next_jobs` leaves out because of their devices or trainer."""
        marks = ",".join("?" * len(trainers))
        sql = (
            f"SELECT * FROM jobs WHERE {STARTABLE}"  # noqa: S608 - our words
            f" AND (json_extract(spec,'$.devices')>? OR json_extract(spec,'$.trainer') NOT IN ({marks})) ORDER BY seq"
        )
        return [job_from_row(row) for row in self.store.read(sql, devices, *trainers)]

    def running(self) -> list[RunningJob]:
        """The running jobs, oldest first."""
        rows = self.store.read(f"{SCHEDULED} WHERE status='running' ORDER BY seq")
        return [RunningJob(job, training_claim(job, count), *rest) for job, count, *rest in rows]

    def stopping(self) -> set[str]:
        """The ids of the running jobs that will give their devices back: they are to end, pause, or be preempted."""
        sql = "SELECT id FROM jobs WHERE status='running' AND (desired<>'run' OR preempted)"
        return {row[0] for row in self.store.read(sql)}


def training_claim(job_id: str, devices: int) -> Claim:
    """The claim of a job that trains on `devices` devices."""
    return Claim(job_id, (Bundle("train", devices),))
