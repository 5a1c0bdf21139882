"""The feed of all jobs' changes, and waiting for them.

A change is noted under the next number of one sequence, in the transaction that makes it. A reader holds the number of
the last change that it knows, reads on from there page by page, and waits for more; so it may stop anywhere, and go on
after any restart. Nothing is kept for a reader but what wakes it. The table holds the newest changes: who comes too
late for the next one is told (`GapError`), and has to look at the jobs themselves.

To begin, take the number `newest` and then look at the jobs: what changes from then on is in the feed.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from arbor_core.storage.database import Store

What = Literal["job", "events", "checkpoints", "policy", "lease"]
"""What of a job has changed: its row, its list of events or of checkpoints, its newest policy, the devices it holds."""
KEPT = 100_000
"""Changes that are kept, at least."""
TRIM_EVERY = 1_000
"""Older ones are deleted whenever so many have come."""
PAGE = 500
LOOK_SECONDS = 5.0
"""How often a reader looks though nothing has woken it."""
GATHER_SECONDS = 0.1
"""Changes that come within this time are read together."""


class Change(msgspec.Struct, frozen=True):
    """That something of a job has changed; what it is now stands in the job's own tables."""

    seq: int
    job_id: str
    what: What


class Changes(msgspec.Struct, frozen=True):
    """A page of the feed."""

    changes: list[Change]
    position: int
    """The number to read on from."""
    more: bool
    """Whether there may be further changes already."""


class GapError(Exception):
    """The changes after a number are not kept any more, or it is a number that was never given."""


def note_change(db: sqlite3.Connection, job_id: str, what: What) -> None:
    """Note that a job has changed; part of the transaction that changes it."""
    sql = "INSERT INTO changes(job_id, owner, what) SELECT id, owner, ? FROM jobs WHERE id=?"
    seq = db.execute(sql, (what, job_id)).lastrowid or 0
    if seq % TRIM_EVERY == 0:
        db.execute("DELETE FROM changes WHERE seq<=?", (seq - KEPT,))


class Feed:
    """The changes of all jobs of one database. For the event loop's thread alone."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.waiting: dict[str, set[asyncio.Future[None]]] = {}
        """By the id of the job that they wait for; "": for any."""

    @property
    def newest(self) -> int:
        """The number of the newest change; 0: there was none yet."""
        row = self.store.one("SELECT max(seq) FROM changes")
        return int(row[0] or 0) if row else 0

    def page(self, after: int, owner: str | None = None, limit: int = PAGE) -> Changes:
        """The changes that follow a number, oldest first; with `owner`, those of their jobs.

        Args:
            limit: How many changes are looked at; fewer are on the page if others own some of the jobs.

        Raises:
            GapError: some of them are gone, or there can be none.
        """
        sql = "SELECT seq, job_id, owner, what FROM changes WHERE seq>? ORDER BY seq LIMIT ?"
        after = self._within(after)
        rows = self.store.read(sql, after, limit)
        gap = rows[0]["seq"] != after + 1 if rows else after > self.newest  # numbers follow one another
        if gap:
            raise GapError(f"the changes after number {after} are not here")
        changes = [Change(row["seq"], row["job_id"], row["what"]) for row in rows if owner in (None, row["owner"])]
        return Changes(changes, rows[-1]["seq"] if rows else after, len(rows) == limit)

    async def follow(self, after: int, owner: str | None = None) -> AsyncIterator[Changes]:
        """The pages that follow a number, as they come, without an end. The next is read when it is wanted. One may be
        empty: its position is where to read on from later.

        Raises:
            GapError: see `page`; also for a reader that takes so long that its next change is gone.
        """
        told = after
        while True:
            page = self.page(after, owner, PAGE)
            after = page.position
            if page.changes or after - told >= PAGE:
                told = after
                yield page
            if not page.more:
                await self.wait(after, LOOK_SECONDS)
                await asyncio.sleep(GATHER_SECONDS)

    async def wait(self, after: int, seconds: float, job_id: str | None = None) -> None:
        """Return when a job (None: any) has changed after a number, or after `seconds`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        others = self.waiting.setdefault(job_id or "", set())
        others.add(future)
        try:
            if not self._has_changed(after, job_id):  # what changes from now on wakes
                await asyncio.wait({future}, timeout=seconds)
        finally:
            others.discard(future)
            if not others and self.waiting.get(job_id or "") is others:
                del self.waiting[job_id or ""]

    def _within(self, after: int) -> int:
        """A number that SQLite can hold, before or after all changes if the given one is."""
        return max(-1, min(after, self.newest + 1))

    def _has_changed(self, after: int, job_id: str | None) -> bool:
        """Whether it has, or may have: a number whose next change is gone, or that was never given, is no place to wait
        at."""
        after = self._within(after)
        first = self.store.read("SELECT seq FROM changes WHERE seq>? ORDER BY seq LIMIT 1", after)
        if first[0]["seq"] != after + 1 if first else after > self.newest:
            return True
        sql = "SELECT 1 FROM changes WHERE seq>? AND ? IN ('', job_id) LIMIT 1"
        return self.store.one(sql, after, job_id or "") is not None

    def notify(self, *job_ids: str) -> None:
        """Wake those who wait for these jobs: what they wait for has been committed."""
        for key in {*job_ids, ""}:
            for future in self.waiting.pop(key, ()):
                if not future.done():
                    future.set_result(None)
