"""The table of leases: which devices a job holds."""

from __future__ import annotations

import sqlite3

from arbor_core.types import Lease

from .records import to_json


def keep_lease(db: sqlite3.Connection, lease: Lease) -> None:
    """Write a lease down; part of the caller's transaction."""
    db.execute(
        "INSERT OR REPLACE INTO leases(id,owner,lease) VALUES(?,?,?)", (lease.id, lease.claim.owner, to_json(lease))
    )
