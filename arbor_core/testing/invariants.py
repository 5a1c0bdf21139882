"""What must hold of a storage directory whatever died in it: for crash tests, chaos runs, and plugins that bring an
executor or a trainer.

    seen = Seen(storage)          # notes what is there, now and later
    ...kill, restart, wait until every job has ended, stop the server...
    seen.look()
    check_invariants(storage)     # and that nothing of it lives any more
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.jobdir import checkpoints, groups, inbox, results, samples
from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.leases import END_REASONS
from arbor_core.storage.atomic import TEMPORARY
from arbor_core.storage.event_log import tail
from arbor_core.types import TERMINAL, Event, Lease, MetricsEvent, pool_for, rollouts
from arbor_core.worker.replay import reported

SHOWN = ("message", "metrics", "checkpoint", "withdrawn")
"""Events of a run that its followers see."""

ENDING_SECONDS = 120.0
"""How long processes may take to see that their server is gone, on a busy machine."""


class Seen:
    """Remembers what was acknowledged, and that it stays: ids, terminal states, the list of events."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.ended: dict[str, str] = {}
        self.events: dict[str, list[str]] = {}
        self.files: set[str] = set()
        self.results: dict[str, dict[int, int]] = {}
        """CRC-32 of the results of each job, by the number of the command."""
        self.change: tuple[int, str, str] = (0, "", "")
        """The newest change in the feed: number, job, and what of it."""
        self.look()

    def look(self) -> None:
        """Compare with what was there before, and remember what is there now.

        Raises:
            AssertionError: something acknowledged is gone or has changed.
        """
        if not (self.storage / "arbor.db").exists():
            assert not self.ended, "the database is gone"
            return
        with closing(database(self.storage)) as db:
            jobs = {row["id"]: row["status"] for row in db.execute("SELECT id, status FROM jobs")}
            files = {row["id"] for row in db.execute("SELECT id FROM files")}
            events: dict[str, list[str]] = {job_id: [] for job_id in jobs}
            for row in db.execute("SELECT job_id, id FROM events ORDER BY job_id, seq"):
                events[row["job_id"]].append(row["id"])
            self._look_at_feed(db)
        for job_id, status in self.ended.items():
            assert jobs.get(job_id) == status, f"job {job_id} had {status}, and is now {jobs.get(job_id)}"
        for job_id, before in self.events.items():
            assert events.get(job_id, [])[: len(before)] == before, f"events of job {job_id} are lost or changed"
        self._look_at_results(jobs)
        assert self.files <= files, f"files that were acknowledged are gone: {self.files - files}"
        self.files, self.events = files, events
        self.ended = {job_id: status for job_id, status in jobs.items() if status in TERMINAL}

    def _look_at_feed(self, db: sqlite3.Connection) -> None:
        """A change keeps its number."""
        sql = "SELECT seq, job_id, what FROM changes WHERE seq=?"
        now = db.execute(sql, (self.change[0],)).fetchone()
        assert not self.change[0] or tuple(now or ()) == self.change, f"the change {self.change} has become {now}"
        newest = db.execute("SELECT seq, job_id, what FROM changes ORDER BY seq DESC LIMIT 1").fetchone()
        self.change = tuple(newest or self.change)

    def _look_at_results(self, jobs: Iterable[str]) -> None:
        """Results that clients may have been told are there, unchanged, until they are acknowledged."""
        for job_id in jobs:
            folder, before = JobDir.of(self.storage, job_id).results, self.results.get(job_id, {})
            now = {place.number: place.crc for place in results.readable(folder, 0)}
            known = results.acknowledged(folder)  # after the log: what is dropped meanwhile was acknowledged
            lost = [number for number, crc in before.items() if number > known and now.get(number) != crc]
            assert not lost, f"results of job {job_id} are lost or changed: those of the commands {lost}"
            self.results[job_id] = now


def check_invariants(storage: Path, *, ended: bool = True, every_step: bool = True) -> None:
    """Check a storage directory, whose server may still run.

    Args:
        storage: The server's `storage`.
        ended: All jobs have ended and the server was stopped: nothing may be left over.
        every_step: The jobs report metrics once for every step.

    Raises:
        AssertionError: what is not as it should be.
    """
    with closing(database(storage)) as db:
        found = [row[0] for row in db.execute("PRAGMA integrity_check")]
        assert found == ["ok"], f"the database is damaged: {found}"
        for row in db.execute("SELECT * FROM jobs").fetchall():
            check_job(db, storage, row, every_step)
        check_files(db, storage)
        check_feed(db)
        check_leases(db)
        check_lease_history(db)
        check_models(db, storage)
    check_processes(storage)
    if ended:
        with closing(database(storage)) as db:
            open_jobs = [tuple(row) for row in db.execute("SELECT id, status FROM jobs") if row[1] not in TERMINAL]
            assert not open_jobs, f"these jobs have not ended: {open_jobs}"
        check_nothing_left(storage)


def database(storage: Path) -> sqlite3.Connection:
    """A connection that only reads."""
    db = sqlite3.connect(f"file:{storage / 'arbor.db'}?mode=ro", uri=True, timeout=10)
    db.row_factory = sqlite3.Row
    return db


def check_job(db: sqlite3.Connection, storage: Path, job: sqlite3.Row, every_step: bool) -> None:
    """A job's events have no gap, and tell what its attempts have written: once each, and in that order."""
    name = job["id"]
    rows = db.execute("SELECT seq, type, message, data FROM events WHERE job_id=? ORDER BY seq", (name,)).fetchall()
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1)), f"{name}: events are missing or repeated"
    if job["status"] in TERMINAL:
        assert job["finished_at"] is not None, f"{name} has ended without a time"
        assert job["ref"] is None, f"{name} has ended and still has a process"
    for column in ("training_file", "validation_file"):
        known = db.execute("SELECT 1 FROM files WHERE id=?", (job[column],)).fetchone()
        assert not job[column] or known, f"{name}: its {column} {job[column]} is unknown"
    logs = [attempt_log(storage, name, attempt) for attempt in range(1, job["attempt"] + 1)]
    for attempt, events in enumerate(logs, 1):
        check_steps(f"{name}, attempt {attempt}", events, every_step)
    told = [msgspec.json.decode(row["data"]) for row in rows if row["type"] == "metrics"]
    written = [event.data for events in logs for event in events if isinstance(event, MetricsEvent)]
    whole = job["status"] in TERMINAL or job["status"] == "paused"
    assert told == (written if whole else written[: len(told)]), f"{name}: metrics were lost or told twice"
    files = JobDir.of(storage, name)
    dirs = {row["dir"] for row in db.execute("SELECT dir FROM checkpoints WHERE job_id=?", (name,))}
    for folder in dirs:
        reason = checkpoints.fault(files.checkpoints / folder)
        assert reason is None, f"{name}: checkpoint {folder} is offered, but: {reason}"
    if whole:
        check_told_checkpoints(files, dirs)
    kind = msgspec.json.decode(job["spec"]).get("input", "file")
    if kind == "rollouts":
        check_rollouts(files)
        check_samples(files)
    elif kind == "commands":
        check_commands(files, succeeded=job["status"] == "succeeded")


def check_commands(job: JobDir, *, succeeded: bool) -> None:
    """Each command stands in the inbox once, and has one result at most, which answers that command. What was
    acknowledged had one; what stands in the last checkpoint of a job that has succeeded has one."""
    name = job.path.name
    commands = {place.number: place.digest for place in inbox.places(job.inbox)}
    assert len(commands) == sum(1 for _ in inbox.places(job.inbox)), f"{name}: a command's number is there twice"
    answered = [(place.number, place.digest) for place, _ in inbox.read(job.results, 0)]
    twice = [number for number, count in Counter(number for number, _ in answered).items() if count > 1]
    assert not twice, f"{name}: these commands have two results: {twice}"
    stray = [number for number, digest in answered if commands.get(number) != digest]
    assert not stray, f"{name}: these results answer no command that came: {stray}"
    there = results.Numbers(results.acknowledged(job.results))
    there.add(*(number for number, _ in answered))
    lost = [number for number in range(1, there.until + 1) if number not in commands]
    assert not lost, f"{name}: these commands were answered, and are not in the inbox: {lost}"
    came = results.Numbers()
    came.add(*commands)
    assert not succeeded or there.until >= came.until, (
        f"{name} has succeeded, commands came up to {came.until}, and results up to {there.until}"
    )


def check_rollouts(job: JobDir) -> None:
    """Every group stands in the inbox once, no completion is in two of them, and the steps took all of them in order:
    each step those that follow the step before."""
    records = list(groups.read(job.inbox, 0))
    ids = Counter(record.group.id for record in records if record.group.id != rollouts.UNNUMBERED)
    labels = Counter(record.group.label for record in records if record.group.label is not None)
    sampled = Counter(n for record in records for rollout in record.group.rollouts for n in rollout.completions)
    twice = [key for found in (ids, labels, sampled) for key, count in found.items() if count > 1]
    assert not twice, f"{job.path.name}: these batch ids, names or completions are in the inbox twice: {twice}"
    position = 0
    for number, step in sorted(reported(job.path).items() if records else ()):
        assert step.fed, f"{job.path.name}: step {number} does not say what it was trained on"
        given = [record.start for record in records if position <= record.start < step.fed.end]
        taken = sorted([start for start, _ in step.fed.groups] + list(step.fed.skipped))
        assert taken == given, f"{job.path.name}, step {number} took the groups at {taken}; next were {given}"
        position = step.fed.end


def check_samples(job: JobDir) -> None:
    """Every group is among the samples once at most, and those of a step are groups that it was trained on."""
    found = [group for place, group in samples.newest_first(job.samples) if place.rollout == 0]
    twice = [position for position, count in Counter(group.position for group in found).items() if count > 1]
    assert not twice, f"{job.path.name}: the groups at {twice} are among the samples twice"
    steps = reported(job.path) if found else {}
    for group in found:
        fed = steps[group.step].fed if group.step in steps else None
        trained = fed is None or group.position in {start for start, _ in fed.groups}
        assert trained, f"{job.path.name}: the group at {group.position} is no part of step {group.step}"
        assert (group.error is None) == (group.step > 0), f"{job.path.name}: what became of {group.position}?"


def attempt_log(storage: Path, job_id: str, attempt: int) -> list[Event]:
    return [event for _, event in tail(JobDir.of(storage, job_id).attempt(attempt).events)]


def check_steps(what: str, events: list[Event], every_step: bool) -> None:
    """Steps of one attempt go up, without a gap if each is reported."""
    steps = [event.step for event in events if isinstance(event, MetricsEvent)]
    if not steps:
        return
    if every_step:
        assert steps == list(range(steps[0], steps[0] + len(steps))), f"{what}: steps {steps}"
    else:
        assert steps == sorted(steps), f"{what}: steps {steps}"


def check_told_checkpoints(job: JobDir, offered: set[str]) -> None:
    """What is whole on the disk is offered, unless a later attempt wrote the same step again."""
    whole = {folder.name for folder in checkpoints.newest_first(job.checkpoints) if not checkpoints.fault(folder)}
    steps = {name.partition("-")[0] for name in offered}
    missing = {name for name in whole - offered if name.partition("-")[0] not in steps}
    assert not missing, f"{job.path.name}: checkpoints {missing} are whole and not offered"


def check_files(db: sqlite3.Connection, storage: Path) -> None:
    """Every file that has a row has its bytes."""
    for row in db.execute("SELECT id, bytes, sha256 FROM files WHERE deleted=0"):
        path = storage / "files" / row["id"]
        assert path.is_file(), f"the bytes of {row['id']} are gone"
        with path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == row["sha256"], f"{row['id']} has other bytes"
    results = Counter(
        file_id for row in db.execute("SELECT result_files FROM jobs") for file_id in msgspec.json.decode(row[0])
    )
    made = {row["id"] for row in db.execute("SELECT id FROM files WHERE purpose='fine-tune-results'")}
    assert made == set(results), f"result files without a job, or missing: {made ^ set(results)}"


def check_feed(db: sqlite3.Connection) -> None:
    """The numbers of the changes in the feed follow one another."""
    count, first, last = db.execute("SELECT count(*), min(seq), max(seq) FROM changes").fetchone()
    assert not count or last - first == count - 1, f"{count} changes are kept, from number {first} to {last}"


def check_leases(db: sqlite3.Connection) -> None:
    """Each lease has a running job, and no device is leased twice."""
    running = {row["id"] for row in db.execute("SELECT id FROM jobs WHERE status='running'")}
    leases = [msgspec.json.decode(row["lease"], type=Lease) for row in db.execute("SELECT lease FROM leases")]
    stray = {lease.claim.owner for lease in leases} - running
    assert not stray, f"leases without a running job: {stray}"
    devices = Counter(device.id for lease in leases for bundle in lease.devices for device in bundle)
    twice = {device for device, count in devices.items() if count > 1}
    assert not twice, f"devices that are leased twice: {twice}"


def check_lease_history(db: sqlite3.Connection) -> None:
    """Whatever has ended says why; what jobs hold has begun and not ended; and no device of a pool was leased more than
    whole at any time."""
    rows = db.execute("SELECT * FROM lease_history ORDER BY began_at, seq").fetchall()
    wrong = [row["id"] for row in rows if row["ended_at"] is not None and row["reason"] not in END_REASONS]
    assert not wrong, f"leases that ended for no reason: {wrong}"
    held = {row["lease"] for row in rows if row["ended_at"] is None}
    begun = {row["id"] for row in db.execute("SELECT id FROM leases")}
    assert begun <= held, f"leases that are not in the history: {begun - held}"
    stray = {row["lease"] for row in rows if row["ended_at"] is None and not row["owner"].startswith("engine:")} - begun
    assert not stray, f"leases of jobs that have not ended in the history: {stray}"
    now: dict[tuple[str, str], list[sqlite3.Row]] = {}
    for row in rows:
        at = now.setdefault((row["device"], pool_for(row["role"])), [])
        at[:] = [one for one in at if one["ended_at"] is None or one["ended_at"] > row["began_at"]]
        at.append(row)
        assert sum(one["share"] for one in at) < 1 + 1e-6, f"leased at the same time: {[tuple(one) for one in at]}"


def check_models(db: sqlite3.Connection, storage: Path) -> None:
    """A job that has succeeded has its model, whose files are there."""
    sql = "SELECT jobs.id, path FROM jobs LEFT JOIN models ON name=fine_tuned_model WHERE status='succeeded'"
    for row in db.execute(sql):
        assert row["path"], f"the model of {row['id']} is unknown"
        reason = checkpoints.fault(storage / row["path"])
        assert reason is None, f"the model of {row['id']}: {reason}"


def processes(storage: Path) -> dict[int, str]:
    """Command lines of processes that work on a storage directory: it is named there, or they are inside it."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            inside = (folder / "cwd").readlink().is_relative_to(storage)
        except OSError:  # it has ended, or is somebody else's
            continue
        if inside or f"{storage}/" in words or f"{storage} " in words:
            found[int(folder.name)] = words.strip()
    return found


def check_processes(storage: Path) -> None:
    """At most one supervisor with its worker for every attempt, and one attempt for every job."""
    supervisors: dict[str, set[str]] = {}
    for pid in processes(storage):
        try:
            parts = Path(f"/proc/{pid}/cwd").readlink().relative_to(storage).parts
        except (OSError, ValueError):
            continue
        if len(parts) >= 4 and parts[0] == "jobs":
            supervisors.setdefault(parts[1], set()).add(parts[3])
    double: dict[str, Any] = {job: attempts for job, attempts in supervisors.items() if len(attempts) > 1}
    assert not double, f"jobs with processes of several attempts: {double}"


def check_nothing_left(storage: Path) -> None:
    """No process, no lease, no half-written file, no socket."""
    deadline = time.monotonic() + ENDING_SECONDS
    while left := processes(storage):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.05)
    with closing(database(storage)) as db:
        leases = db.execute("SELECT count(*) FROM leases").fetchone()[0]
        assert leases == 0, f"{leases} leases are left"
        held = [tuple(row) for row in db.execute("SELECT * FROM lease_history WHERE ended_at IS NULL")]
        assert not held, f"leases whose end is not known: {held}"
        known = {row["id"] for row in db.execute("SELECT id FROM jobs")}
    strange = {path.name for path in storage.glob("jobs/*")} - known
    assert not strange, f"directories of jobs that there are not: {strange}"
    partial = list(map(str, leftovers(storage)))
    assert not partial, f"half-written files or sockets are left: {partial}"


def leftovers(storage: Path) -> list[Path]:
    """What only a process that works has use for: unfinished files, scratch directories, sockets."""
    found = [path for path in storage.rglob("*") if path.suffix == TEMPORARY or path.is_socket()]
    for job in (JobDir(path) for path in storage.glob("jobs/*")):
        found += [attempt.work for attempt in job.attempts() if attempt.work.exists()]
    return found + list((storage / "files" / ".incoming").glob("*"))
