"""The states of a job in SQL and in Python say the same."""

from __future__ import annotations

import json
import sqlite3
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from arbor_core.jobs import states
from arbor_core.jobs.queue import JobQueue
from arbor_core.storage.database import Store
from arbor_core.types import TERMINAL, Desired, Status

STATES = list(product(get_args(Status), get_args(Desired), (0, 1)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A job in every state that there can be: status, desired, attempt."""
    store = Store(tmp_path / "arbor.db")
    store.write_now(
        "INSERT INTO jobs(id,owner,created_at,training_file,spec,hyperparameters,status,desired,attempt)"
        " SELECT key,'o',0,'','{}','{}', json_extract(value,'$[0]'), json_extract(value,'$[1]'),"
        " json_extract(value,'$[2]') FROM json_each(?)",
        json.dumps(STATES),
    )
    return store


def statuses(store: Store, where: str) -> set[str]:
    return {row[0] for row in store.read(f"SELECT status FROM jobs WHERE {where}")}


def test_each_status_has_ended_or_not(store: Store) -> None:
    assert statuses(store, states.ENDED) == TERMINAL
    assert statuses(store, states.NOT_ENDED) == set(get_args(Status)) - TERMINAL
    assert statuses(store, states.VALIDATED) | statuses(store, states.WAITING) == set(get_args(Status)) - TERMINAL


def test_out_of_place_is_what_belongs_elsewhere(store: Store) -> None:
    found = {tuple(row) for row in store.read(f"SELECT status, desired, attempt FROM jobs WHERE {states.OUT_OF_PLACE}")}
    targets: dict[tuple[str, str, int], str | None] = {}
    for status, desired, attempt in STATES:
        job: Any = SimpleNamespace(status=status, desired=desired, attempt=attempt)
        targets[status, desired, attempt] = states.idle_target(job)
    elsewhere = {state for state, target in targets.items() if target}
    unvalidated = {("validating_files", "finish", 0)}
    assert found == elsewhere - unvalidated, "a job is validated before it is found to have nothing to finish"
    assert all(target != status for (status, _, _), target in targets.items())


def test_jobs_out_of_place_are_found_by_their_index_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs there are: by itself SQLite looks at all that are queued."""
    plans: list[str] = []
    read = store.read

    def explained(sql: str) -> list[sqlite3.Row]:
        plans.extend(row[3] for row in read(f"EXPLAIN QUERY PLAN {sql}"))
        return []

    monkeypatch.setattr(store, "read", explained)
    JobQueue(store).out_of_place()
    assert plans == ["SCAN jobs USING INDEX jobs_out_of_place"]
