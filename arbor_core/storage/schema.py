"""The tables of the database, version by version."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable

from arbor_core import ids

FIRST = """
CREATE TABLE files(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, purpose TEXT NOT NULL,
  filename TEXT NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, created_at INTEGER NOT NULL,
  expires_at INTEGER, status TEXT NOT NULL, deleted INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE jobs(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
  status TEXT NOT NULL CHECK(status IN
    ('validating_files','queued','running','paused','succeeded','failed','cancelled')),
  desired TEXT NOT NULL DEFAULT 'run' CHECK(desired IN('run','pause','cancel','finish')),
  attempt INTEGER NOT NULL DEFAULT 0, priority INTEGER NOT NULL DEFAULT 0,
  created_at INTEGER NOT NULL, finished_at INTEGER, training_file TEXT NOT NULL, validation_file TEXT,
  fine_tuned_model TEXT, metadata TEXT, spec TEXT NOT NULL, hyperparameters TEXT NOT NULL, error TEXT,
  trained_tokens INTEGER, result_files TEXT NOT NULL DEFAULT '[]', ref TEXT, offset INTEGER NOT NULL DEFAULT 0,
  progress INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE INDEX jobs_by_status ON jobs(status);
CREATE INDEX jobs_by_owner ON jobs(owner, seq);
CREATE TABLE events(
  job_id TEXT NOT NULL, seq INTEGER NOT NULL, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, level TEXT NOT NULL,
  type TEXT NOT NULL, message TEXT NOT NULL, data TEXT, PRIMARY KEY(job_id, seq)) STRICT, WITHOUT ROWID;
CREATE TABLE checkpoints(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL, created_at INTEGER NOT NULL,
  step INTEGER NOT NULL, dir TEXT NOT NULL, model TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE(job_id, step)) STRICT;
CREATE TABLE models(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, job_id TEXT NOT NULL,
  base TEXT NOT NULL, base_path TEXT NOT NULL, path TEXT NOT NULL, kind TEXT NOT NULL CHECK(kind IN('adapter','full')),
  created_at INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE leases(id TEXT PRIMARY KEY, owner TEXT NOT NULL, lease TEXT NOT NULL) STRICT;
"""


REPEATS = """
CREATE TABLE repeats(
  caller TEXT NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL, response BLOB NOT NULL, expires_at INTEGER NOT NULL,
  PRIMARY KEY(caller, key)) STRICT;
CREATE INDEX repeats_by_end ON repeats(expires_at);
"""


QUEUE = """
ALTER TABLE jobs ADD COLUMN preempted INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN turn INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN waited INTEGER NOT NULL DEFAULT 0;
DROP INDEX jobs_by_status;
CREATE INDEX jobs_by_age ON jobs(status, seq, desired);
CREATE INDEX jobs_by_priority ON jobs(status, priority DESC, seq, desired);
CREATE INDEX jobs_by_turn ON jobs(turn);
CREATE INDEX jobs_out_of_place ON jobs(seq) WHERE (status='queued' AND desired<>'run')
  OR (status='paused' AND desired<>'pause') OR (status='validating_files' AND desired='cancel');
"""


ROLLOUTS = """
CREATE TABLE policies(
  job_id TEXT PRIMARY KEY, version INTEGER NOT NULL, handled INTEGER NOT NULL, dir TEXT NOT NULL) STRICT;
CREATE TABLE named_checkpoints(
  job_id TEXT NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL, dir TEXT NOT NULL, metadata TEXT NOT NULL,
  created_at INTEGER NOT NULL, PRIMARY KEY(job_id, name)) STRICT;
DROP INDEX jobs_out_of_place;
CREATE INDEX jobs_out_of_place ON jobs(seq)
  WHERE (status='queued' AND (desired IN('pause','cancel') OR (desired='finish' AND attempt=0)))
  OR (status='paused' AND desired<>'pause') OR (status='validating_files' AND desired='cancel');
"""


PARTS = """
CREATE TABLE uploads(
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, purpose TEXT NOT NULL, filename TEXT NOT NULL, bytes INTEGER NOT NULL,
  lifetime INTEGER, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL,
  status TEXT NOT NULL CHECK(status IN('pending','completed','cancelled','expired')),
  file_id TEXT, part_ids TEXT) STRICT;
CREATE INDEX uploads_by_end ON uploads(status, expires_at);
CREATE TABLE upload_parts(
  id TEXT PRIMARY KEY, upload_id TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL) STRICT;
CREATE INDEX parts_by_upload ON upload_parts(upload_id);
ALTER TABLE jobs ADD COLUMN memory_retries INTEGER NOT NULL DEFAULT 0;
"""


FURTHEST = """
ALTER TABLE jobs ADD COLUMN furthest INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET furthest=progress;
"""


CHANGES = """
CREATE TABLE changes(
  seq INTEGER PRIMARY KEY, job_id TEXT NOT NULL, owner TEXT NOT NULL, what TEXT NOT NULL) STRICT;
"""
"""Its newest row is never deleted, so that numbers follow one another without a gap."""


def relative_paths(db: sqlite3.Connection) -> None:
    """Give the storage directory an identity, and make every path relative to it. The base model of a job, which lies
    outside, is known by its name alone from now on: its path is empty."""
    db.execute("CREATE TABLE storage(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
    db.execute("INSERT INTO storage(key,value) VALUES('id',?)", (ids.new("storage_"),))
    jobs = {row[0] for row in db.execute("SELECT id FROM jobs")}

    def inside(path: str | None) -> str | None:
        parts = (path or "").split("/")
        if len(parts) >= 4 and parts[-4] == "jobs" and parts[-3] in jobs and parts[-2] == "checkpoints":
            return "/".join(parts[-4:])
        return None

    sql = "SELECT id, json_extract(spec,'$.model_path'), json_extract(spec,'$.adapter_path') FROM jobs"
    for job_id, model, adapter in db.execute(sql).fetchall():
        values = (inside(model), inside(adapter), job_id)
        db.execute("UPDATE jobs SET spec=json_set(spec,'$.model_path',?,'$.adapter_path',?) WHERE id=?", values)
    for seq, base_path, path in db.execute("SELECT seq, base_path, path FROM models").fetchall():
        values = (inside(base_path) or "", inside(path) or "", seq)
        db.execute("UPDATE models SET base_path=?, path=? WHERE seq=?", values)


INPUT = """
UPDATE jobs SET spec=json_set(json_remove(spec,'$.rollouts'),'$.input',
  iif(json_extract(spec,'$.rollouts'),'rollouts','file')) WHERE json_extract(spec,'$.input') IS NULL;
"""


LEASE_HISTORY = """
CREATE TABLE lease_history(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, lease TEXT NOT NULL, owner TEXT NOT NULL,
  device TEXT NOT NULL, role TEXT NOT NULL, share REAL NOT NULL, began_at REAL NOT NULL, ended_at REAL, reason TEXT,
  CHECK((ended_at IS NULL)=(reason IS NULL))) STRICT;
CREATE INDEX lease_history_of_devices ON lease_history(device, seq);
CREATE INDEX lease_history_now ON lease_history(device) WHERE ended_at IS NULL;
CREATE INDEX lease_history_open ON lease_history(lease) WHERE ended_at IS NULL
"""


def lease_history(db: sqlite3.Connection) -> None:
    """Begin the history of leases with those of the jobs that run now: since the last event of their beginning."""
    for statement in LEASE_HISTORY.split(";"):
        db.execute(statement)
    for (lease,) in db.execute("SELECT lease FROM leases").fetchall():
        found = json.loads(lease)
        owner = found["claim"]["owner"]
        sql = "SELECT max(created_at) FROM events WHERE job_id=? AND message='Fine-tuning job started'"
        began = db.execute(sql, (owner,)).fetchone()[0] or time.time()
        pairs = zip(found["claim"]["bundles"], found["devices"], strict=True)
        held = [(bundle, device["id"]) for bundle, devices in pairs for device in devices]
        for number, (bundle, device) in enumerate(held):
            db.execute(
                "INSERT INTO lease_history(id,lease,owner,device,role,share,began_at) VALUES(?,?,?,?,?,?,?)",
                (f"{found['id']}.{number}", found["id"], owner, device, bundle["role"], bundle["share"], float(began)),
            )


SENDERS = """
ALTER TABLE policies ADD COLUMN sent TEXT NOT NULL DEFAULT '';
"""
"""What a sender returned of the policy, as JSON; empty: it is a directory under `weights`."""


STEPS = """
ALTER TABLE events ADD COLUMN step INTEGER;
ALTER TABLE events ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0;
ALTER TABLE events ADD COLUMN superseded INTEGER NOT NULL DEFAULT 0;
CREATE INDEX events_of_steps ON events(job_id, step) WHERE step IS NOT NULL
"""
"""`step` is that of metrics. They are superseded where a later attempt has made the step again."""


def steps(db: sqlite3.Connection) -> None:
    """Mark the metrics of steps that were made again. Which attempt an event is from was not kept: a new one has begun
    where steps go back."""
    for statement in STEPS.split(";"):
        db.execute(statement)
    sql = "SELECT job_id, seq, json_extract(data,'$.step') FROM events WHERE type='metrics' ORDER BY job_id, seq"
    job, before, attempt, newest = "", 0, 1, dict[int, int]()
    for job_id, seq, step in db.execute(sql).fetchall():
        if step is None:
            continue
        if job_id != job:
            job, before, attempt, newest = job_id, 0, 1, {}
        attempt += step < before
        before = step
        if newest.setdefault(step, attempt) < attempt:
            earlier = "UPDATE events INDEXED BY events_of_steps SET superseded=1 WHERE job_id=? AND step=? AND seq<?"
            db.execute(earlier, (job_id, step, seq))
            newest[step] = attempt
        db.execute("UPDATE events SET step=?, attempt=? WHERE job_id=? AND seq=?", (step, attempt, job_id, seq))


SCHEMA: tuple[str | Callable[[sqlite3.Connection], None], ...] = (
    FIRST,
    REPEATS,
    QUEUE,
    ROLLOUTS,
    PARTS,
    FURTHEST,
    relative_paths,
    CHANGES,
    INPUT,
    lease_history,
    SENDERS,
    steps,
)
"""Each makes a database of the version before into one of its own (the first is 1). What was released never changes."""


VERSION = len(SCHEMA)
