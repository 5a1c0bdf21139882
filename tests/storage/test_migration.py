"""A database that an earlier version wrote is brought up to date: all of it is kept, or nothing is changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

from arbor_core import ArborError
from arbor_core.storage import database
from arbor_core.storage.database import Store
from arbor_core.storage.schema import FIRST, VERSION


def as_first(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Turn a database into one of version 1, as far as that knew it; returns its rows."""
    with closing(sqlite3.connect(path)) as new, closing(sqlite3.connect(path.with_suffix(".old"))) as old:
        old.executescript(f"{FIRST} PRAGMA user_version=1;")
        tables = [row[0] for row in old.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        for table in tables:
            columns = ",".join(row[1] for row in old.execute(f"PRAGMA table_info({table})"))
            rows = new.execute(f"SELECT {columns} FROM {table}").fetchall()
            old.execute(f"DELETE FROM {table}")
            for row in rows:
                old.execute(f"INSERT INTO {table}({columns}) VALUES({','.join('?' * len(row))})", row)
        old.commit()
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.with_suffix(".old").rename(path)
    return contents(path)


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of every table of version 1, in its columns."""
    with closing(sqlite3.connect(":memory:")) as first, closing(sqlite3.connect(path)) as db:
        first.executescript(FIRST)
        found = {}
        for (table,) in first.execute("SELECT name FROM sqlite_master WHERE type='table' AND name<>'sqlite_sequence'"):
            columns = ",".join(row[1] for row in first.execute(f"PRAGMA table_info({table})"))
            found[table] = db.execute(f"SELECT {columns} FROM {table} ORDER BY 1").fetchall()
        return found


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_a_server_takes_over_what_the_first_version_wrote(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server()
    file = server.upload(chat_rows)
    job = server.client.fine_tuning.jobs.create(model="mock/tiny", training_file=file, metadata={"a": "b"})
    done = server.wait(job.id)
    told = [event.id for event in server.client.fine_tuning.jobs.list_events(job.id, limit=100)]
    server.stop()
    before = as_first(server.storage / "arbor.db")
    assert version(server.storage / "arbor.db") == 1
    assert before["jobs"]
    assert before["events"]
    assert before["models"]
    again = start_server()
    assert again.client.fine_tuning.jobs.retrieve(job.id) == done
    assert [event.id for event in again.client.fine_tuning.jobs.list_events(job.id, limit=100)] == told
    assert again.client.models.retrieve(done.fine_tuned_model)
    assert again.client.files.content(file).read()
    more = again.client.fine_tuning.jobs.create(model="mock/tiny", training_file=file)
    again.wait(more.id)
    again.stop()
    assert version(server.storage / "arbor.db") == VERSION
    after = contents(server.storage / "arbor.db")
    for table, rows in before.items():
        assert set(rows) <= set(after[table]), table


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "arbor.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{FIRST} PRAGMA user_version=1;")
    monkeypatch.setattr(database, "SCHEMA", (FIRST, "CREATE TABLE more(a TEXT) STRICT; CREATE TABLE more(a TEXT);"))
    monkeypatch.setattr(database, "VERSION", 2)
    with pytest.raises(ArborError, match=r"table more already exists.*nothing was changed"):
        Store(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name='more'").fetchall()


def test_every_way_leads_to_the_same_schema(tmp_path: Path) -> None:
    def shape(path: Path) -> list[Any]:
        with closing(sqlite3.connect(path)) as db:
            return db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()

    with closing(sqlite3.connect(tmp_path / "old.db")) as db:
        db.executescript(f"{FIRST} PRAGMA user_version=1;")
    for name in ("old.db", "new.db"):
        Store(tmp_path / name).close()
    assert shape(tmp_path / "old.db") == shape(tmp_path / "new.db")
    assert version(tmp_path / "old.db") == VERSION


def test_row_110_a_newer_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "arbor.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={VERSION + 1}")
    with pytest.raises(ArborError, match=f"newer Arbor.*schema {VERSION + 1}, this one knows {VERSION}"):
        Store(path)
    assert version(path) == VERSION + 1


def test_what_jobs_learn_from_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "arbor.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{FIRST} PRAGMA user_version=1;")
        for name, spec in (("file", '{"seed":1}'), ("rollouts", '{"rollouts":true}'), ("none", '{"rollouts":false}')):
            values = (name, "me", "queued", 0, "", spec, "{}")
            columns = "id,owner,status,created_at,training_file,spec,hyperparameters"
            db.execute(f"INSERT INTO jobs({columns}) VALUES(?,?,?,?,?,?,?)", values)
        db.commit()
    Store(path).close()
    with closing(sqlite3.connect(path)) as db:
        found = dict(db.execute("SELECT id, json_extract(spec,'$.input') FROM jobs").fetchall())
        assert found == {"file": "file", "rollouts": "rollouts", "none": "file"}
        assert not db.execute("SELECT 1 FROM jobs WHERE json_extract(spec,'$.rollouts') IS NOT NULL").fetchall()


def test_steps_that_were_made_again_are_marked(tmp_path: Path) -> None:
    """Steps that go back belong to another attempt; two events of one step in a row are of the same."""
    path = tmp_path / "arbor.db"
    told = [("a", 1), ("a", 2), ("a", 3), ("a", 2), ("a", 3), ("a", 3), ("b", 2), ("a", None)]
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{FIRST} PRAGMA user_version=1;")
        for seq, (job, step) in enumerate(told, 1):
            data = f'{{"step":{step}}}' if step else None
            values = (job, seq, f"e{seq}", 1, "info", "metrics" if step else "message", "", data)
            columns = "job_id,seq,id,created_at,level,type,message,data"
            db.execute(f"INSERT INTO events({columns}) VALUES(?,?,?,?,?,?,?,?)", values)
        db.commit()
    Store(path).close()
    with closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT step, attempt, superseded FROM events ORDER BY seq").fetchall()
    assert found[:4] == [(1, 1, 0), (2, 1, 1), (3, 1, 1), (2, 2, 0)]
    assert found[4:] == [(3, 2, 0), (3, 2, 0), (2, 1, 0), (None, 0, 0)]
