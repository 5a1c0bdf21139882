"""The states of a job in SQL and in Python say the same."""

from __future__ import annotations

import sqlite3
from itertools import product
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from arbor_core.jobs import states
from arbor_core.jobs.queue import JobQueue
from arbor_core.storage.schema import SCHEMA
from arbor_core.types import TERMINAL, Desired, Status

STATUSES, DESIRED = get_args(Status), get_args(Desired)


@pytest.fixture
def db() -> sqlite3.Connection:
    """A job in every state that there can be."""
    db = sqlite3.connect(":memory:")
    for script in SCHEMA:
        db.executescript(script)
    for status, desired, attempt in product(STATUSES, DESIRED, (0, 1)):
        db.execute(
            "INSERT INTO jobs(id,owner,created_at,training_file,spec,hyperparameters,status,desired,attempt)"
            " VALUES(?,'o',0,'','{}','{}',?,?,?)",
            (f"{status} {desired} {attempt}", status, desired, attempt),
        )
    return db


def statuses(db: sqlite3.Connection, where: str) -> set[str]:
    return {row[0] for row in db.execute(f"SELECT status FROM jobs WHERE {where}")}


def test_each_status_has_ended_or_not(db: sqlite3.Connection) -> None:
    assert statuses(db, states.ENDED) == TERMINAL
    assert statuses(db, states.NOT_ENDED) == set(STATUSES) - TERMINAL
    assert statuses(db, states.VALIDATED) | statuses(db, states.WAITING) == set(STATUSES) - TERMINAL


def test_out_of_place_is_what_belongs_elsewhere(db: sqlite3.Connection) -> None:
    found = set(db.execute(f"SELECT status, desired, attempt FROM jobs WHERE {states.OUT_OF_PLACE}"))
    targets: dict[tuple[str, str, int], str | None] = {}
    for status, desired, attempt in product(STATUSES, DESIRED, (0, 1)):
        job: Any = SimpleNamespace(status=status, desired=desired, attempt=attempt)
        targets[status, desired, attempt] = states.idle_target(job)
    elsewhere = {state for state, target in targets.items() if target}
    unvalidated = {("validating_files", "finish", 0)}
    assert found == elsewhere - unvalidated, "a job is validated before it is found to have nothing to finish"
    assert all(target != status for (status, _, _), target in targets.items())


def test_jobs_out_of_place_are_found_by_their_index_alone(db: sqlite3.Connection) -> None:
    """However many jobs there are: by itself SQLite looks at all that are queued."""
    statements: list[str] = []

    def read(sql: str) -> list[sqlite3.Row]:
        statements.append(sql)
        return []

    store: Any = SimpleNamespace(read=read)
    JobQueue(store).out_of_place()
    plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")]
    assert plan == ["SCAN jobs USING INDEX jobs_out_of_place"]
