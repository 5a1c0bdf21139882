"""A job's events and checkpoints in the database.

What writes is part of the caller's transaction: a job's state never changes without its events.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import msgspec

from arbor_core import ids
from arbor_core.storage.database import Store
from arbor_core.types import (
    CheckpointDiscarded,
    CheckpointEvent,
    CheckpointWithdrawn,
    Event,
    GroupsSkipped,
    HyperparametersResolved,
    MessageEvent,
    MetricsEvent,
    PolicyPublished,
    ResumePointWritten,
)

from .feed import note_change
from .policies import name_checkpoint, record_policy
from .records import Job, to_json

SUPERSEDE = (
    "UPDATE events INDEXED BY events_of_steps SET superseded=1"  # else SQLite reads all events of the job
    " WHERE job_id=? AND step=? AND attempt<? AND superseded=0"
)
PUBLIC = (MessageEvent, MetricsEvent, CheckpointEvent, CheckpointWithdrawn)
"""Kinds of an attempt's events that clients see."""


def apply_events(db: sqlite3.Connection, job: Job, events: Sequence[Event], model: str) -> None:
    """Store what an attempt reports: its events, and what follows from them.

    Args:
        model: Name of the job's model; a checkpoint's is this with `:ckpt-step-N`.
    """
    add_events(db, job.id, [event for event in events if isinstance(event, PUBLIC)], job.attempt)
    for event in events:
        if isinstance(event, HyperparametersResolved):
            hyperparameters = {**job.hyperparameters, **event.hyperparameters}
            db.execute("UPDATE jobs SET hyperparameters=? WHERE id=?", (to_json(hyperparameters), job.id))
            note_change(db, job.id, "job")
        elif isinstance(event, CheckpointEvent):
            add_checkpoint(db, job.id, event, f"{model}:ckpt-step-{event.step}")
        elif isinstance(event, ResumePointWritten):
            note_progress(db, job.id, event.step)
        elif isinstance(event, PolicyPublished | GroupsSkipped):
            record_policy(db, job.id, event)
        elif isinstance(event, CheckpointDiscarded | CheckpointWithdrawn):
            remove_checkpoint(db, job.id, event.dir)


def add_events(db: sqlite3.Connection, job_id: str, events: Sequence[Event], attempt: int = 0) -> None:
    """Append events to a job's list. Their times never decrease, though a clock may be set back. Metrics supersede
    those of the same step that an earlier attempt has reported.

    Args:
        attempt: That reports them; 0: the server.
    """
    last = "SELECT seq, created_at FROM events WHERE job_id=? ORDER BY seq DESC LIMIT 1"
    seq, newest = db.execute(last, (job_id,)).fetchone() or (0, 0)
    for event in events:
        seq += 1
        newest = max(newest, int(event.at or time.time()))
        kind, step = ("metrics", event.step) if isinstance(event, MetricsEvent) else ("message", None)
        if step is not None:
            db.execute(SUPERSEDE, (job_id, step, attempt))
        data = to_json(event.data or None)
        db.execute(
            "INSERT INTO events(job_id,seq,id,created_at,level,type,message,data,step,attempt)"
            " VALUES(?,?,?,?,?,?,?,?,?,?)",
            (job_id, seq, ids.new("ftevent-"), newest, event.level, kind, event.message, data, step, attempt),
        )
    if events:
        note_change(db, job_id, "events")


def metrics_by_step(store: Store, job_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The metrics of each step, by step, of the newest attempt that made it; where several of its events have the same
    metric of one, the last value. There may be millions: they are sorted by SQLite, and read as they are wanted."""
    sql = "SELECT step, data FROM events WHERE job_id=? AND step IS NOT NULL AND superseded=0 ORDER BY step, seq"
    for step, rows in groupby(store.each(sql, job_id), key=itemgetter("step")):
        metrics: dict[str, Any] = {}
        for row in rows:
            metrics.update(msgspec.json.decode(row["data"]))
        yield step, metrics


def add_checkpoint(db: sqlite3.Connection, job_id: str, event: CheckpointEvent, model: str) -> None:
    """Store a checkpoint. One that a later attempt wrote at the same step replaces the earlier one."""
    db.execute(
        "INSERT INTO checkpoints(id,job_id,created_at,step,dir,model,metrics) VALUES(?,?,?,?,?,?,?)"
        " ON CONFLICT(job_id,step) DO UPDATE SET dir=excluded.dir, metrics=excluded.metrics",
        (
            ids.new("ftckpt_"),
            job_id,
            int(event.at),
            event.step,
            event.dir,
            model,
            to_json(event.metrics),
        ),
    )
    if event.name:
        name_checkpoint(db, job_id, event.name, event.step, event.dir, event.metadata)
    note_progress(db, job_id, event.step)
    note_change(db, job_id, "checkpoints")


def note_progress(db: sqlite3.Connection, job_id: str, step: int) -> None:
    """A job can go on after this step: if none of its attempts had got as far, what died before does not count."""
    db.execute(
        "UPDATE jobs SET crashes=iif(:step>furthest,0,crashes), furthest=max(furthest,:step),"
        " progress=max(progress,:step) WHERE id=:id",
        {"step": step, "id": job_id},
    )


def remove_checkpoint(db: sqlite3.Connection, job_id: str, folder: str) -> None:
    """Remove a checkpoint from the job's list; `folder` is the name of its directory."""
    if not db.execute("DELETE FROM checkpoints WHERE job_id=? AND dir=?", (job_id, folder)).rowcount:
        return
    highest = "SELECT ifnull(max(step), 0) FROM checkpoints WHERE job_id=?"
    db.execute(f"UPDATE jobs SET progress=min(progress, ({highest})) WHERE id=?", (job_id, job_id))  # noqa: S608
    note_change(db, job_id, "checkpoints")


def has_checkpoint(db: sqlite3.Connection, job_id: str, folder: str) -> bool:
    """Whether a checkpoint is in the job's list; `folder` is the name of its directory."""
    return db.execute("SELECT 1 FROM checkpoints WHERE job_id=? AND dir=?", (job_id, folder)).fetchone() is not None
