"""The line that jobs stand in, as schedulers see it: who is next, who runs, who is not where it was asked to be."""

from __future__ import annotations

from collections.abc import Sequence

from arbor_core.storage.database import Store
from arbor_core.types import Bundle, Claim, QueuedJob, RunningJob

from .records import Job, job_from_row
from .states import OUT_OF_PLACE

IN_LINE = (
    "SELECT id, json_extract(spec,'$.devices'), seq, priority,"
    " waited + (status='queued') * ((SELECT max(turn) FROM jobs) - turn) FROM jobs"
)


class JobQueue:
    """The queued and running jobs of one database."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def out_of_place(self) -> list[Job]:
        """Jobs that no process works on, and that are asked to be in another state."""
        return [job_from_row(row) for row in self.store.read(f"SELECT * FROM jobs WHERE {OUT_OF_PLACE} ORDER BY seq")]  # noqa: S608 - our words

    def next_jobs(self, limit: int, devices: int, trainers: Sequence[str]) -> list[QueuedJob]:
        """The next jobs to start: the `limit` that came first and the `limit` of the highest priority.

        Args:
            devices: Leaves out jobs that need more.
            trainers: Leaves out jobs of others.
        """
        marks = ",".join("?" * len(trainers))
        sql = (
            f"{IN_LINE} WHERE status='queued' AND desired IN('run','finish') AND json_extract(spec,'$.devices')<=?"
            f" AND json_extract(spec,'$.trainer') IN ({marks}) ORDER BY %s LIMIT ?"
        )
        orders = ("seq", "priority DESC, seq")
        rows = [row for order in orders for row in self.store.read(sql % order, devices, *trainers, limit)]
        return list({job: QueuedJob(job, training_claim(job, count), *rest) for job, count, *rest in rows}.values())

    def unschedulable(self, devices: int, trainers: Sequence[str]) -> list[Job]:
        """The queued jobs that `front` leaves out."""
        marks = ",".join("?" * len(trainers))
        sql = (
            "SELECT * FROM jobs WHERE status='queued' AND desired IN('run','finish')"  # noqa: S608
            f" AND (json_extract(spec,'$.devices')>? OR json_extract(spec,'$.trainer') NOT IN ({marks})) ORDER BY seq"
        )
        return [job_from_row(row) for row in self.store.read(sql, devices, *trainers)]

    def running(self) -> list[RunningJob]:
        """The running jobs, oldest first."""
        rows = self.store.read(f"{IN_LINE} WHERE status='running' ORDER BY seq")
        return [RunningJob(job, training_claim(job, count), *rest) for job, count, *rest in rows]

    def stopping(self) -> set[str]:
        """The ids of the running jobs that are asked to end, or to make room."""
        sql = "SELECT id FROM jobs WHERE status='running' AND (desired<>'run' OR preempted)"
        return {row[0] for row in self.store.read(sql)}


def training_claim(job_id: str, devices: int) -> Claim:
    """What a job needs in order to train."""
    return Claim(job_id, (Bundle("train", devices),))
