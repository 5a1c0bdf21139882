"""Policies that trainers published, the newest of each job, and checkpoints that clients named."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from arbor_core.storage.codec import shallow
from arbor_core.storage.database import Store
from arbor_core.types import GroupsSkipped, NamedCheckpoint, Policy, PolicyPublished

from .feed import note_change


def record_policy(db: sqlite3.Connection, job_id: str, event: PolicyPublished | GroupsSkipped) -> None:
    """Store what a trainer has published and handled; part of the caller's transaction.

    A later attempt that repeats steps of an earlier one reverts nothing: completions come from the newest version that
    was ever published, and there are no new credits until the trainer has caught up. Of one that is published again the
    later counts: what the earlier attempt had sent has ended with it, and of its files only some are kept.

    A version that no attempt had reached before is progress and resets `crashes`, even of a job without checkpoints,
    whose attempts begin anew.
    """
    version, folder, sent = 0, "", ""
    if isinstance(event, PolicyPublished):
        version, folder = event.version, event.dir
        sent = "" if event.sent is None else msgspec.json.encode(event.sent).decode()
    db.execute(
        "UPDATE jobs SET crashes=0 WHERE id=? AND ?>ifnull((SELECT version FROM policies WHERE job_id=?), 0)",
        (job_id, version, job_id),
    )
    newer = "excluded.dir<>'' AND excluded.version>=version"
    db.execute(
        "INSERT INTO policies(job_id,version,handled,dir,sent) VALUES(?,?,?,?,?) ON CONFLICT(job_id) DO UPDATE SET"
        f" handled=max(handled,excluded.handled), dir=iif({newer},excluded.dir,dir),"
        f" sent=iif({newer},excluded.sent,sent), version=max(version,excluded.version)",
        (job_id, version, event.handled, folder, sent),
    )
    note_change(db, job_id, "policy")


def newest_policy(store: Store, job_id: str) -> tuple[Policy, str]:
    """The newest policy of a job, and the name of its directory under `weights`; empty before the first."""
    row = store.one("SELECT version, handled, dir FROM policies WHERE job_id=?", job_id)
    return (Policy(row["version"], row["handled"]), row["dir"]) if row else (Policy(), "")


def sent_policy(store: Store, job_id: str) -> dict[str, Any] | None:
    """What a sender returned of the newest policy of a job; None: it is a directory, or there is none."""
    row = store.one("SELECT sent FROM policies WHERE job_id=?", job_id)
    return msgspec.json.decode(row["sent"], type=dict[str, Any]) if row and row["sent"] else None


def name_checkpoint(
    db: sqlite3.Connection, job_id: str, name: str, step: int, folder: str, metadata: Mapping[str, Any]
) -> None:
    """Give a checkpoint a name; part of the caller's transaction."""
    db.execute(
        "INSERT OR REPLACE INTO named_checkpoints(job_id,name,step,dir,metadata,created_at) VALUES(?,?,?,?,?,?)",
        (job_id, name, step, folder, msgspec.json.encode(metadata).decode(), int(time.time())),
    )
    note_change(db, job_id, "checkpoints")


def named_checkpoint_sizes(store: Store, job_id: str) -> dict[str, int]:
    """The size of the metadata of each named checkpoint of a job, in characters of JSON."""
    sql = "SELECT name, length(metadata) AS size FROM named_checkpoints WHERE job_id=?"
    return {row["name"]: row["size"] for row in store.read(sql, job_id)}


def named_checkpoints(store: Store, job_id: str) -> list[NamedCheckpoint]:
    """The named checkpoints of a job, oldest first."""
    rows = store.read(
        "SELECT n.name, n.step, c.model, n.metadata, n.created_at FROM named_checkpoints n"
        " JOIN checkpoints c ON c.job_id=n.job_id AND c.step=n.step WHERE n.job_id=? ORDER BY n.created_at, n.step",
        job_id,
    )
    return [
        NamedCheckpoint(row["name"], row["step"], row["model"], shallow(row["metadata"]), row["created_at"])
        for row in rows
    ]
