"""Jobs in the database, and the state machine: every transition is one compare-and-swap together with its event.

`status` is where a job is, `desired` where its client wants it (`types/jobs.py`); the dispatcher moves one towards the
other. `attempt` fences off what an older process still writes. A terminal status never changes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from arbor_core import ids
from arbor_core.crash_points import crash_point
from arbor_core.storage.database import Store
from arbor_core.types import (
    TERMINAL,
    CheckpointEvent,
    CheckpointRequest,
    CheckpointWithdrawn,
    Desired,
    Event,
    MessageEvent,
    Status,
)

from .events import add_events, apply_events, has_checkpoint
from .feed import Feed, note_change
from .policies import name_checkpoint
from .records import (
    JSON_COLUMNS,
    CheckpointRow,
    EventRow,
    Job,
    NewJob,
    checkpoint_from_row,
    event_from_row,
    insert_job,
    job_from_row,
    to_json,
)
from .states import ENDED, LIVE, NOT_ENDED, WAITING

T = TypeVar("T")
LAST_TURN = "SELECT max(turn) FROM jobs"
"""The number of attempts that were started so far, of all jobs."""


class Jobs:
    """The jobs of one database."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.feed = Feed(store)

    async def _write(self, change: Callable[[sqlite3.Connection], T], *job_ids: str) -> T:
        """Change these jobs, then wake those who wait for them."""
        return await self.store.write(change, lambda: self.feed.notify(*job_ids))

    async def create(
        self,
        new: NewJob,
        warnings: Sequence[str] = (),
        also: Callable[[sqlite3.Connection, Job], object] | None = None,
    ) -> Job:
        """Insert a job in `validating_files`, with its first events.

        Args:
            also: More changes for the same transaction; if it raises, there is no job.
        """
        job_id = ids.new("ftjob-")
        events = [MessageEvent(f"Created fine-tuning job: {job_id}")]
        events += [MessageEvent(warning, "warn") for warning in warnings]
        if new.training_file:
            events.append(MessageEvent(f"Validating training file: {new.training_file}"))

        def insert(db: sqlite3.Connection) -> Job:
            job = insert_job(db, job_id, new)
            note_change(db, job_id, "job")
            add_events(db, job_id, events)
            if also:
                also(db, job)
            return job

        job = await self._write(insert, job_id)
        crash_point("job.created")
        return job

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """One job; with `owner`, only if it is theirs."""
        row = self.store.one("SELECT * FROM jobs WHERE id=?", job_id)
        job = job_from_row(row) if row else None
        return job if job and owner in (None, job.owner) else None

    def with_status(self, status: Status, limit: int = -1) -> list[Job]:
        """Jobs in this state, oldest first."""
        sql = "SELECT * FROM jobs WHERE status=? ORDER BY seq LIMIT ?"
        return [job_from_row(row) for row in self.store.read(sql, status, limit)]

    def ids_with_status(self, status: Status, limit: int = -1) -> list[str]:
        """The ids of the jobs in this state, oldest first."""
        sql = "SELECT id FROM jobs WHERE status=? ORDER BY seq LIMIT ?"
        return [row[0] for row in self.store.read(sql, status, limit)]

    def page(
        self, owner: str, limit: int, after: int | None, metadata: Mapping[str, str] | str | None = ""
    ) -> list[Job]:
        """Jobs newest first, older than `after` (a `seq`).

        Args:
            metadata: Pairs that a job's metadata must hold; None: jobs without metadata; "": any job.
        """
        where, values = ["owner=?"], [owner]
        if after is not None:
            where.append("seq<?")
            values.append(after)  # type: ignore[arg-type]
        if metadata is None:
            where.append("metadata IS NULL")
        elif isinstance(metadata, Mapping):
            for key, value in metadata.items():
                where.append("EXISTS(SELECT 1 FROM json_each(metadata) WHERE key=? AND value=?)")
                values += [key, value]
        sql = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?"  # noqa: S608
        return [job_from_row(row) for row in self.store.read(sql, *values, limit)]

    def newest_rollout_job(self, owner: str) -> str | None:
        """The newest job that learns from rollouts, of those that have not ended if there are any."""
        rollouts = "json_extract(spec,'$.input')='rollouts'"
        sql = f"SELECT id FROM jobs WHERE owner=? AND {rollouts} ORDER BY {ENDED}, seq DESC LIMIT 1"  # noqa: S608
        row = self.store.one(sql, owner)
        return str(row[0]) if row else None

    def live_jobs_after(self, seq: int) -> list[tuple[int, str]]:
        """`seq` and id of the jobs that learn from what clients send and were created after the job `seq`, oldest
        first."""
        sql = f"SELECT seq, id FROM jobs WHERE seq>? AND {LIVE} ORDER BY seq"  # noqa: S608
        return [(row["seq"], row["id"]) for row in self.store.read(sql, seq)]

    def ended(self, job_ids: Collection[str]) -> set[str]:
        """Those of these jobs that have ended, or that do not exist."""
        sql = f"SELECT value FROM json_each(?) WHERE value NOT IN (SELECT id FROM jobs WHERE {NOT_ENDED})"  # noqa: S608
        return {row[0] for row in self.store.read(sql, to_json(list(job_ids)))}

    def count_waiting(self) -> int:
        """How many jobs wait for an attempt."""
        row = self.store.one(f"SELECT count(*) FROM jobs WHERE {WAITING}")  # noqa: S608
        return int(row[0]) if row else 0

    async def transition(
        self,
        job: Job,
        to: Status,
        *events: Event,
        attempt: int | None = None,
        only_if: Desired | None = None,
        also: Callable[[sqlite3.Connection], object] | None = None,
        **changes: Any,
    ) -> Job | None:
        """Move a job from the status and attempt in `job` to another, if it is still there.

        Args:
            to: The new status.
            events: The job's new events, for the same transaction.
            attempt: The number of the attempt that begins, if one does.
            only_if: What must still be desired of the job: one that was cancelled meanwhile does not start.
            also: More changes for the same transaction.
            changes: Columns to set.

        Returns:
            The job after the transition; None: it was moved before, and nothing was changed.
        """
        if job.status in TERMINAL:
            return None
        if to in TERMINAL:
            changes |= {"finished_at": max(int(time.time()), job.created_at)}  # a clock may be set back
        sets = ["status=:_to", "preempted=0"]
        if to == "queued":
            sets.append(f"turn=({LAST_TURN})")
        if attempt is not None:
            changes |= {"attempt": attempt, "offset": 0}
            sets += [f"waited=waited+({LAST_TURN})-turn", f"turn=({LAST_TURN})+1"]
        values = {name: to_json(value) if name in JSON_COLUMNS else value for name, value in changes.items()}
        sets += [f"{name}=:{name}" for name in values]
        values |= {"_to": to, "_id": job.id, "_from": job.status, "_attempt": job.attempt, "_only_if": only_if}

        def swap(db: sqlite3.Connection) -> Job | None:
            swapped = db.execute(
                f"UPDATE jobs SET {','.join(sets)} WHERE id=:_id AND status=:_from AND attempt=:_attempt"  # noqa: S608 - our columns
                " AND desired=coalesce(:_only_if,desired)",
                values,
            )
            if swapped.rowcount == 0:
                return None
            note_change(db, job.id, "job")
            add_events(db, job.id, events)
            if also:
                also(db)
            return read_job(db, job.id)

        return await self._write(swap, job.id)

    async def add_event(self, event: Event, *job_ids: str) -> None:
        """Add an event of the server's own to these jobs."""

        def change(db: sqlite3.Connection) -> None:
            for job_id in job_ids:
                add_events(db, job_id, [event])

        await self._write(change, *job_ids)

    async def preempt(self, job_id: str) -> None:
        """Let a running job write a checkpoint, give its devices back and queue again."""
        sql = "UPDATE jobs SET preempted=1 WHERE id=? AND status='running' AND desired='run' AND NOT preempted"
        await self._update(sql, (job_id,), job_id)

    async def set_desired(self, job_id: str, desired: Desired) -> Job | None:
        """Set what is desired of a job, unless it has ended or is to be cancelled; returns the job after that."""
        sql = f"UPDATE jobs SET desired=? WHERE id=? AND {NOT_ENDED} AND desired<>'cancel'"  # noqa: S608
        await self._update(sql, (desired, job_id), job_id)
        crash_point(f"job.{desired}")
        return self.get(job_id)

    async def note_ref(self, job: Job, ref: str) -> Job | None:
        """Remember where an attempt runs, if the job is still at it; returns the job as it is then."""

        def change(db: sqlite3.Connection) -> Job | None:
            sql = "UPDATE jobs SET ref=? WHERE id=? AND attempt=?"
            if db.execute(sql, (ref, job.id, job.attempt)).rowcount:
                note_change(db, job.id, "job")
            return read_job(db, job.id)

        return await self._write(change, job.id)

    async def _update(self, sql: str, values: Sequence[object], job_id: str) -> None:
        """Set columns of a job, if its row is as the statement wants it."""

        def change(db: sqlite3.Connection) -> None:
            if db.execute(sql, values).rowcount:
                note_change(db, job_id, "job")

        await self._write(change, job_id)

    async def ingest(self, job: Job, events: Sequence[Event], offset: int, model: str) -> Job | None:
        """Store events of an attempt's log together with the offset that follows them: none twice, none lost.

        Args:
            offset: In bytes; `job.offset` is where the events begin.
            model: See `apply_events`.

        Returns:
            The job after that; None: the attempt is not the job's any more, and nothing was stored.
        """

        def store_events(db: sqlite3.Connection) -> Job | None:
            advanced = db.execute(
                "UPDATE jobs SET offset=? WHERE id=? AND attempt=? AND offset=?",
                (offset, job.id, job.attempt, job.offset),
            )
            if advanced.rowcount == 0:
                return None
            apply_events(db, job, events, model)
            return read_job(db, job.id)

        return await self._write(store_events, job.id)

    async def reconcile(self, job: Job, found: Sequence[CheckpointEvent | CheckpointWithdrawn], model: str) -> None:
        """Store checkpoints that are on the disk but in no attempt's log, and withdraw damaged ones, each once.

        Args:
            model: See `apply_events`.
        """

        def change(db: sqlite3.Connection) -> None:
            for event in found:
                if has_checkpoint(db, job.id, event.dir) == isinstance(event, CheckpointWithdrawn):
                    apply_events(db, job, [event], model)

        await self._write(change, job.id)

    async def name_checkpoint(self, job_id: str, request: CheckpointRequest, last: CheckpointRow) -> None:
        """Give a checkpoint a name."""
        name, metadata = request.name, request.metadata
        await self._write(lambda db: name_checkpoint(db, job_id, name, last.step, last.dir, metadata), job_id)

    def events(self, job_id: str, limit: int, before: int | None = None, *, superseded: bool = False) -> list[EventRow]:
        """Events newest first, older than `before` (a `seq`).

        Args:
            superseded: With the metrics of steps that a later attempt has made again.
        """
        sql = "SELECT * FROM events WHERE job_id=? AND seq<? AND superseded<=? ORDER BY seq DESC LIMIT ?"
        return [event_from_row(row) for row in self.store.read(sql, job_id, before or 1 << 60, superseded, limit)]

    def events_after(self, job_id: str, seq: int, limit: int) -> list[EventRow]:
        """Events oldest first, newer than `seq`, without those that are superseded."""
        sql = "SELECT * FROM events WHERE job_id=? AND seq>? AND superseded=0 ORDER BY seq LIMIT ?"
        return [event_from_row(row) for row in self.store.read(sql, job_id, seq, limit)]

    def event_seq(self, job_id: str, event_id: str) -> int | None:
        """The `seq` of an event of the job."""
        row = self.store.one("SELECT seq FROM events WHERE id=? AND job_id=?", event_id, job_id)
        return int(row[0]) if row else None

    def checkpoints(self, job_id: str, limit: int, before: int | None = None) -> list[CheckpointRow]:
        """Checkpoints newest first, older than `before` (a step)."""
        sql = "SELECT * FROM checkpoints WHERE job_id=? AND step<? ORDER BY step DESC LIMIT ?"
        return [checkpoint_from_row(row) for row in self.store.read(sql, job_id, before or 1 << 60, limit)]

    def checkpoint(self, *, id: str | None = None, model: str | None = None) -> CheckpointRow | None:
        """One checkpoint, by its id or by its model name."""
        row = self.store.one("SELECT * FROM checkpoints WHERE id=? OR model=?", id, model)
        return checkpoint_from_row(row) if row else None


def keep_paused(job_id: str) -> Callable[[sqlite3.Connection], object]:
    """A change, for another's transaction, that lets a job that had to be paused stay so until it is resumed."""
    return lambda db: db.execute("UPDATE jobs SET desired='pause' WHERE id=? AND desired='run'", (job_id,))


def read_job(db: sqlite3.Connection, job_id: str) -> Job | None:
    """A job as the caller's transaction sees it."""
    row = db.execute("SELECT * FROM jobs WHERE id=?", (job_id,)).fetchone()
    return job_from_row(row) if row else None
