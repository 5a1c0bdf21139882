"""The tables of leases: which devices the running jobs hold, for the server that starts next; and the history of each
device: who had it, from when to when, and why that ended.

What a job holds changes in one transaction with the job itself, and so does its history. An engine lives no longer
than its server, so its leases are in the history alone, which is written without waiting for it (`LeaseHistory`): one
that a killed server left open is closed by the next.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, get_args

import msgspec

from arbor_core.storage.database import Store
from arbor_core.types import Lease, pool_for

from .feed import note_change
from .records import to_json

log = logging.getLogger(__name__)
KEPT = 500
"""Leases of each device that are remembered."""
RECENT = 64
"""Leases of a device among which is the one that ended last."""

LeaseEnd = Literal[
    "succeeded",
    "failed",
    "cancelled",
    "paused",
    "preempted",
    "crashed",
    "hung",
    "out_of_memory",
    "device_lost",
    "not_started",
    "idle",
    "made_room",
    "died",
    "killed",
    "deleted",
    "job_ended",
    "server_ended",
    "unknown",
]
"""Why a lease ended.

Of a job: it succeeded, failed, was cancelled or paused, or was preempted by a more urgent one; its attempt crashed,
hung, ran out of memory or lost a device, or could not be started. Of an engine: it was idle, or made room for another;
its process died, or was killed because it hung or must not answer again; it could not be started; its model was
deleted, or the job whose policy it served has ended; its server ended. `unknown`: the disk was full when it ended.
"""
LEFT_OPEN = "ended_at IS NULL AND lease NOT IN (SELECT id FROM leases)"
"""Of rows whose lease no job holds."""
END_REASONS = frozenset(get_args(LeaseEnd))


class LeaseRow(msgspec.Struct, frozen=True):
    """One row of `lease_history`: a device of a lease. Times are in seconds since the epoch."""

    seq: int
    id: str
    lease: str
    owner: str
    """A job's id, or `engine:<model>`."""
    device: str
    role: str
    share: float
    began_at: float
    ended_at: float | None
    reason: LeaseEnd | None


def write_lease(db: sqlite3.Connection, lease: Lease) -> None:
    """Store a job's lease, and begin its history; part of the caller's transaction."""
    db.execute(
        "INSERT OR REPLACE INTO leases(id,owner,lease) VALUES(?,?,?)", (lease.id, lease.claim.owner, to_json(lease))
    )
    note_change(db, lease.claim.owner, "lease")
    begin(db, lease)


def end_leases(db: sqlite3.Connection, job_id: str, reason: LeaseEnd) -> None:
    """Delete the leases of a job, and end their history; part of the caller's transaction."""
    for (lease,) in db.execute("SELECT id FROM leases WHERE owner=?", (job_id,)).fetchall():
        end(db, lease, reason)
    if db.execute("DELETE FROM leases WHERE owner=?", (job_id,)).rowcount:
        note_change(db, job_id, "lease")


def read_leases(store: Store) -> list[Lease]:
    """All leases. A `claim.owner` is the id of a job, which may have ended without giving its lease back."""
    return [msgspec.json.decode(row["lease"], type=Lease) for row in store.read("SELECT lease FROM leases")]


def begin(db: sqlite3.Connection, lease: Lease) -> None:
    """Begin the history of a lease; part of the caller's transaction."""
    pairs = zip(lease.claim.bundles, lease.devices, strict=True)
    held = [(bundle, device.id) for bundle, devices in pairs for device in devices]
    for number, (bundle, device) in enumerate(held):
        if bundle.share >= 1:
            _close_forgotten(db, device, pool_for(bundle.role))
        recent = "SELECT ended_at FROM lease_history WHERE device=? ORDER BY seq DESC LIMIT ?"
        last = db.execute(f"SELECT max(ended_at) FROM ({recent})", (device, RECENT)).fetchone()[0]  # noqa: S608
        began = max(time.time(), last or 0.0)  # a clock may be set back
        db.execute(
            "INSERT OR REPLACE INTO lease_history(id,lease,owner,device,role,share,began_at) VALUES(?,?,?,?,?,?,?)",
            (f"{lease.id}.{number}", lease.id, lease.claim.owner, device, bundle.role, bundle.share, began),
        )
        oldest = "SELECT seq FROM lease_history WHERE device=? ORDER BY seq DESC LIMIT 1 OFFSET ?"
        db.execute(
            f"DELETE FROM lease_history WHERE device=? AND ended_at IS NOT NULL AND seq<=({oldest})",  # noqa: S608
            (device, device, KEPT),
        )


def _close_forgotten(db: sqlite3.Connection, device: str, pool: str) -> None:
    """End what was before on a device that is leased whole now, and whose end could not be written."""
    sql = f"SELECT id, role FROM lease_history WHERE device=? AND {LEFT_OPEN}"  # noqa: S608
    for row, role in db.execute(sql, (device,)).fetchall():
        if pool_for(role) == pool:
            _close(db, "id=?", row, "unknown")


def end(db: sqlite3.Connection, lease_id: str, reason: LeaseEnd, at: float | None = None) -> None:
    """End the history of a lease; part of the caller's transaction. `at`: None: now."""
    _close(db, "lease=?", lease_id, reason, at)


def _close(db: sqlite3.Connection, where: str, value: str, reason: LeaseEnd, at: float | None = None) -> None:
    sql = f"UPDATE lease_history SET ended_at=max(began_at,?), reason=? WHERE ended_at IS NULL AND {where}"  # noqa: S608
    db.execute(sql, (time.time() if at is None else at, reason, value))


class LeaseHistory:
    """The history of leases that are not in the database themselves: those of engines. What it is told is written in
    this order, and nobody waits for it. Where that fails, on a full disk, a lease is missing, and an end is written
    with what comes next."""

    def __init__(self, store: Store) -> None:
        """End what an earlier server has left open."""
        self.store = store
        self.writes = 0
        self.ends: dict[str, tuple[int, LeaseEnd, float]] = {}
        """Of leases whose end is not written, by id: the number of the write that does so, why they ended, and when.
        Earlier writes leave them alone: one of those begins the lease."""
        if store.one(f"SELECT 1 FROM lease_history WHERE {LEFT_OPEN} LIMIT 1"):  # noqa: S608 - our words
            self._write(close_left_open)

    def begin(self, lease: Lease) -> None:
        self._write(lambda db: begin(db, lease))

    def end(self, lease: Lease, reason: LeaseEnd) -> None:
        self.ends[lease.id] = self.writes + 1, reason, time.time()
        self._write(lambda db: None)

    def _write(self, change: Callable[[sqlite3.Connection], Any]) -> None:
        """Make a change, after the ends that are not written."""
        self.writes += 1
        number = self.writes

        def changed(db: sqlite3.Connection) -> list[str]:
            ends = {lease_id: ended for lease_id, ended in list(self.ends.items()) if ended[0] <= number}
            for lease_id, (_, reason, at) in ends.items():
                end(db, lease_id, reason, at)
            change(db)
            return list(ends)

        self.store.submit(changed).add_done_callback(self._written)

    def _written(self, outcome: Future[list[str]]) -> None:
        report(outcome)
        if not outcome.cancelled() and not outcome.exception():
            for lease_id in outcome.result():
                self.ends.pop(lease_id, None)


def close_left_open(db: sqlite3.Connection) -> None:
    """End the history of leases that nobody holds any more: their server was killed."""
    for (row,) in db.execute(f"SELECT id FROM lease_history WHERE {LEFT_OPEN}").fetchall():  # noqa: S608
        _close(db, "id=?", row, "server_ended")


def report(outcome: Future[Any]) -> None:
    """Say what could not be written."""
    if not outcome.cancelled() and (error := outcome.exception()):
        log.warning("the history of a lease could not be written: %s", error)


def lease_rows(
    store: Store, limit: int, before: int | None = None, device: str | None = None, *, held: bool = False
) -> list[LeaseRow]:
    """The history newest first, older than `before` (a `seq`).

    Args:
        device: Of this device alone.
        held: Only what is leased now.
    """
    where, values = ["seq<?"], [before or 1 << 60]
    if device is not None:
        where.append("device=?")
        values.append(device)  # type: ignore[arg-type]
    if held:
        where.append("ended_at IS NULL")
    sql = f"SELECT * FROM lease_history WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?"  # noqa: S608
    rows = store.read(sql, *values, limit)
    return [msgspec.convert(dict(row), LeaseRow) for row in rows]


def lease_seq(store: Store, row_id: str) -> int | None:
    """The `seq` of a row of the history."""
    row = store.one("SELECT seq FROM lease_history WHERE id=?", row_id)
    return int(row[0]) if row else None
