"""A job's events in the database."""

from __future__ import annotations

import sqlite3
import tracemalloc
from pathlib import Path

from arbor_core import MessageEvent, MetricsEvent
from arbor_core.jobs.events import add_events, metrics_by_step
from arbor_core.jobs.records import EventRow, JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.storage.database import Store


async def test_row_112_a_clock_that_jumps_back_reorders_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    job = await jobs.create(
        NewJob("me", "file-x", None, None, {}, JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1))
    )
    for at in (2e9, 1e9, 3e9):
        await jobs.ingest(job, [MessageEvent(f"{at:g}", at=at)], job.offset, "m")
    times = [event.created_at for event in jobs.events(job.id, 100)][::-1]
    assert times[-3:] == [2_000_000_000, 2_000_000_000, 3_000_000_000]
    assert times == sorted(times)
    store.close()


async def test_metrics_of_a_long_job_are_not_in_memory_at_once(tmp_path: Path) -> None:
    """Steps that a later attempt makes again come once, with what it says of them."""
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    job = await jobs.create(
        NewJob("me", "file-x", None, None, {}, JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1))
    )
    steps, again = 20_000, 500
    for number, made in enumerate((range(1, steps + 1), range(steps - again, steps + again))):
        events = [MetricsEvent(step=step, total_steps=99, values={"train_loss": step + number}) for step in made]
        await jobs.ingest(job, [*events, MetricsEvent(step=7, total_steps=99, values={"valid_loss": 3})], 0, "m")
    tracemalloc.start()
    for count, (step, metrics) in enumerate(metrics_by_step(store, job.id), 1):
        assert step == count
        assert metrics["train_loss"] == step + (step >= steps - again)
        assert metrics.get("valid_loss") == (3 if step == 7 else None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == steps + again - 1
    assert peak < 1 << 20, "bytes in memory"
    seen, pages = 0, 0
    while rows := jobs.events_after(job.id, seen, 5_000):
        assert [row.seq for row in rows] == list(range(seen + 1, seen + len(rows) + 1))
        seen, pages = rows[-1].seq, pages + 1
    assert pages == 5
    store.close()


async def test_a_step_of_a_long_job_costs_what_the_first_does(tmp_path: Path) -> None:
    """Counted in instructions of SQLite: a step does not look at all that were before."""
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
    job = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    spent = []
    with sqlite3.connect(tmp_path / "arbor.db") as db:
        for step in (1, 2_000):
            done = 0

            def count() -> None:
                nonlocal done
                done += 1

            db.set_progress_handler(count, 1)
            add_events(db, job.id, [MetricsEvent(step=step, total_steps=9, values={})], attempt=1)
            db.set_progress_handler(None, 1)
            spent.append(done)
            add_events(db, job.id, [MetricsEvent(step=n, total_steps=9, values={}) for n in range(2, 2_000)], attempt=1)
    assert spent[1] < 2 * spent[0]
    store.close()


async def test_steps_that_a_later_attempt_makes_again_are_superseded(tmp_path: Path) -> None:
    store = Store(tmp_path / "arbor.db")
    jobs = Jobs(store)
    spec = JobSpec("t", "supervised", {}, model="m", model_path="m", seed=1)
    job = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    other = await jobs.create(NewJob("me", "file-x", None, None, {}, spec))
    for attempt, made in enumerate(([1, 2, 3, 4], [3, 4], [4, 5]), 1):
        begun = await jobs.transition(job, job.status, attempt=attempt)
        assert begun
        events = [MetricsEvent(step=n, total_steps=9, values={"train_loss": n + attempt / 10}) for n in made]
        more = MetricsEvent(step=made[0], total_steps=9, values={"valid_loss": 7.0})  # of the same attempt
        job = await jobs.ingest(begun, [*events, more], begun.offset, "m") or job
    await jobs.ingest(other, [MetricsEvent(step=4, total_steps=9, values={})], other.offset, "m")

    def losses(rows: list[EventRow]) -> list[tuple[int, float]]:
        return [(row.data["step"], row.data["train_loss"]) for row in rows if row.data and "train_loss" in row.data]

    once = [(1, 1.1), (2, 2.1), (3, 3.2), (4, 4.3), (5, 5.3)]
    assert losses(jobs.events(job.id, 100)[::-1]) == once
    assert losses(jobs.events_after(job.id, 0, 100)) == once
    every = jobs.events(job.id, 100, superseded=True)[::-1]
    assert losses(every) == [(1, 1.1), (2, 2.1), (3, 3.1), (4, 4.1), (3, 3.2), (4, 4.2), (4, 4.3), (5, 5.3)]
    assert [row.seq for row in every] == list(range(1, len(every) + 1))
    assert [row.superseded for row in every if row.data and "train_loss" in row.data] == [0, 0, 1, 1, 0, 1, 0, 0]
    assert [(step, found["train_loss"]) for step, found in metrics_by_step(store, job.id)] == once
    assert [found.get("valid_loss") for _, found in metrics_by_step(store, job.id)] == [7.0, None, 7.0, 7.0, None]
    store.close()
