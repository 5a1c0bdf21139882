"""The table of leases: which devices the running jobs hold, for the server that starts next."""

from __future__ import annotations

import sqlite3

import msgspec

from arbor_core.storage.database import Store
from arbor_core.types import Lease

from .feed import note_change
from .records import to_json


def write_lease(db: sqlite3.Connection, lease: Lease) -> None:
    """Store a lease; part of the caller's transaction."""
    db.execute(
        "INSERT OR REPLACE INTO leases(id,owner,lease) VALUES(?,?,?)", (lease.id, lease.claim.owner, to_json(lease))
    )
    note_change(db, lease.claim.owner, "lease")


def delete_leases(db: sqlite3.Connection, job_id: str) -> None:
    """Delete the leases of a job; part of the caller's transaction."""
    if db.execute("DELETE FROM leases WHERE owner=?", (job_id,)).rowcount:
        note_change(db, job_id, "lease")


def read_leases(store: Store) -> list[Lease]:
    """All leases. A `claim.owner` is the id of a job, which may have ended without giving its lease back."""
    return [msgspec.json.decode(row["lease"], type=Lease) for row in store.read("SELECT lease FROM leases")]
