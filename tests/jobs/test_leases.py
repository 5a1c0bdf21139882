"""The history of leases: no device is leased twice at a time, every end has its reason, and it stays bounded."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arbor_core.jobs import leases
from arbor_core.jobs.leases import LeaseHistory, end_leases, lease_rows, lease_seq, write_lease
from arbor_core.storage.database import Store
from arbor_core.storage.schema import SCHEMA, lease_history
from arbor_core.testing.invariants import check_lease_history
from arbor_core.types import Bundle, Claim, Device, Lease


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "arbor.db")
    yield found
    with sqlite3.connect(tmp_path / "arbor.db") as db:
        db.row_factory = sqlite3.Row
        check_lease_history(db)
    found.close()


def lease(name: str, owner: str, role: str, *devices: str, share: float = 1.0) -> Lease:
    bundle = Bundle(role, len(devices), share)
    return Lease(name, Claim(owner, (bundle,)), (tuple(Device(device) for device in devices),))


def change(store: Store, what: Callable[..., Any], *values: Any) -> None:
    store.submit(lambda db: what(db, *values)).result()


def history(store: Store, **which: Any) -> list[tuple[str, str, str | None]]:
    """Owner, device and reason, newest first."""
    return [(row.owner, row.device, row.reason) for row in lease_rows(store, 1000, **which)]


def test_a_jobs_lease_is_in_the_history_of_each_device(store: Store) -> None:
    change(store, write_lease, lease("a", "job-1", "train", "gpu-0", "gpu-1"))
    assert history(store, held=True) == [("job-1", "gpu-1", None), ("job-1", "gpu-0", None)]
    change(store, end_leases, "job-1", "preempted")
    change(store, write_lease, lease("b", "job-1", "train", "gpu-1"))
    assert history(store) == [
        ("job-1", "gpu-1", None),
        ("job-1", "gpu-1", "preempted"),
        ("job-1", "gpu-0", "preempted"),
    ]
    assert history(store, device="gpu-0") == [("job-1", "gpu-0", "preempted")]
    first = lease_rows(store, 1)[0]
    assert (first.lease, first.role, first.share, first.ended_at) == ("b", "train", 1.0, None)
    assert lease_seq(store, first.id) == first.seq
    assert [row.lease for row in lease_rows(store, 9, before=first.seq)] == ["a", "a"]
    assert lease_seq(store, "b.9") is None
    change(store, end_leases, "job-1", "succeeded")


def test_what_undoes_a_lease_undoes_its_history(store: Store) -> None:
    def fail(db: sqlite3.Connection) -> None:
        write_lease(db, lease("a", "job-1", "train", "gpu-0"))
        raise ValueError("the job was moved before")

    with pytest.raises(ValueError, match="moved"):
        store.submit(fail).result()
    assert history(store) == []


def test_engines_leases_are_written_in_order(store: Store) -> None:
    known = LeaseHistory(store)
    for number in range(20):
        held = lease(f"e{number}", f"engine:{number}", "engine", "gpu-0")
        known.begin(held)
        known.end(held, "made_room")
    shares = [lease(f"s{number}", f"engine:s{number}", "engine", "gpu-0", share=0.5) for number in range(2)]
    for held in shares:
        known.begin(held)
    change(store, write_lease, lease("a", "job-1", "train", "gpu-0"))  # of another pool, on the same device
    assert len(history(store, held=True)) == 3
    for held in shares:
        known.end(held, "idle")
    change(store, end_leases, "job-1", "failed")
    assert [reason for _, _, reason in history(store)] == ["failed", "idle", "idle", *["made_room"] * 20]


def test_a_lease_that_ends_before_its_beginning_is_written_has_its_end(store: Store) -> None:
    known, held, go_on = LeaseHistory(store), lease("e", "engine:one", "engine", "gpu-0"), threading.Event()
    store.submit(lambda db: go_on.wait(120))
    known.begin(held)
    known.end(held, "idle")
    go_on.set()
    store.submit(lambda db: None).result()
    assert history(store) == [("engine:one", "gpu-0", "idle")]
    assert not known.ends


def test_the_next_server_ends_what_a_killed_one_left_open(store: Store) -> None:
    LeaseHistory(store).begin(lease("e", "engine:one", "engine", "gpu-1"))
    change(store, write_lease, lease("a", "job-1", "train", "gpu-0"))
    LeaseHistory(store)
    store.submit(lambda db: None).result()
    assert history(store) == [("job-1", "gpu-0", None), ("engine:one", "gpu-1", "server_ended")]
    change(store, end_leases, "job-1", "cancelled")


def test_an_end_that_could_not_be_written_is_unknown(store: Store) -> None:
    known = LeaseHistory(store)
    known.begin(lease("e", "engine:one", "engine", "gpu-0"))
    change(store, write_lease, lease("a", "job-1", "train", "gpu-0"))
    known.begin(lease("f", "engine:two", "engine", "gpu-0"))
    store.submit(lambda db: None).result()
    assert history(store) == [
        ("engine:two", "gpu-0", None),
        ("job-1", "gpu-0", None),
        ("engine:one", "gpu-0", "unknown"),
    ]
    change(store, end_leases, "job-1", "cancelled")


def test_a_failure_to_write_reaches_nobody_but_the_log(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known, held = LeaseHistory(store), lease("e", "engine:one", "engine", "gpu-0")

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as failing:
        failing.setattr(leases, "begin", full)
        known.begin(held)
        store.submit(lambda db: None).result()
    known.end(held, "idle")
    store.submit(lambda db: None).result()
    assert "database or disk is full" in caplog.text
    assert history(store) == []


def test_times_do_not_overlap_when_a_clock_is_set_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1000.0, 990.0, 980.0, 970.0])
    monkeypatch.setattr(leases.time, "time", lambda: next(times))
    for name in "ab":
        change(store, write_lease, lease(name, f"job-{name}", "train", "gpu-0"))
        change(store, end_leases, f"job-{name}", "succeeded")
    assert [(row.began_at, row.ended_at) for row in lease_rows(store, 9)] == [(1000.0, 1000.0)] * 2


def test_only_the_newest_of_each_device_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "KEPT", 3)
    change(store, write_lease, lease("long", "job-long", "train", "gpu-1"))
    for number in range(10):
        change(store, write_lease, lease(f"l{number}", f"job-{number}", "train", "gpu-0"))
        change(store, end_leases, f"job-{number}", "succeeded")
    owners = [owner for owner, _, _ in history(store)]
    assert owners == ["job-9", "job-8", "job-7", "job-long"]
    change(store, end_leases, "job-long", "succeeded")


def test_the_history_begins_with_what_running_jobs_hold(tmp_path: Path) -> None:
    """A server that takes over the storage of one that had no history yet."""
    before = SCHEMA.index(lease_history)
    held = lease("a", "job-1", "train", "gpu-0", "gpu-1")
    with sqlite3.connect(tmp_path / "old.db") as db:
        for step in SCHEMA[:before]:
            if callable(step):
                step(db)
            else:
                db.executescript(step)
        db.execute("INSERT INTO leases VALUES('a','job-1',?)", (msgspec.json.encode(held).decode(),))
        sql = "INSERT INTO events VALUES('job-1',?,?,?,'info','message',?,NULL)"
        db.execute(sql, (1, "e1", 100, "Fine-tuning job started"))
        db.execute(sql, (2, "e2", 200, "Fine-tuning job started"))
        db.execute(sql, (3, "e3", 300, "Step 1"))
        db.execute(f"PRAGMA user_version={before}")
    store = Store(tmp_path / "old.db")
    assert [(row.device, row.role, row.began_at) for row in lease_rows(store, 9, held=True)] == [
        ("gpu-1", "train", 200.0),
        ("gpu-0", "train", 200.0),
    ]
    change(store, end_leases, "job-1", "succeeded")
    assert history(store, held=True) == []
    store.close()


def test_an_end_that_a_full_disk_has_refused_is_written_with_what_comes_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, first = LeaseHistory(store), lease("e", "engine:one", "engine", "gpu-0")
    known.begin(first)
    change(store, lambda db: None)
    with monkeypatch.context() as full:

        def refuse(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        full.setattr(leases, "end", refuse)
        known.end(first, "idle")
        change(store, lambda db: None)
    assert history(store) == [("engine:one", "gpu-0", None)]
    known.begin(lease("f", "engine:two", "engine", "gpu-1"))
    change(store, lambda db: None)
    assert history(store) == [("engine:two", "gpu-1", None), ("engine:one", "gpu-0", "idle")]
    assert known.ends == {}
