"""The database: one SQLite file, one writer.

Every change is made on the writer's thread, whole or not at all, and is on the disk when its caller hears of it;
changes that wait at the same time share one commit. Those of requests go first, and wait for no more of the others
than about two commits take. Reads go through a connection per thread and never wait for the writer (WAL). What a table
means is known by the rooms that use it: `jobs`, `files`, `uploads`, `models`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from arbor_core.crash_points import crash_point
from arbor_core.types import ArborError

from .background import is_background
from .schema import SCHEMA, VERSION

T = TypeVar("T")
Change = Callable[[sqlite3.Connection], Any]
Waiting = tuple[Change, "Future[Any]"]
REPAIR = (
    " It is damaged: put a backup in its place, or save what can be read with"
    " `sqlite3 {path} .recover | sqlite3 {path}.new` and put that in its place"
)
BATCH = 100
"""Changes that share a commit, at most, so that none waits long for the others."""
HURRY_SECONDS = 0.01
"""How long others may put off a commit that a request waits for, or as long as the last commit took: half of the time
is theirs."""


class Store:
    """The database file.

    Raises:
        ArborError: it cannot be opened, is damaged, or was written by a newer Arbor; nothing is changed then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._requests: SimpleQueue[Waiting] = SimpleQueue()
        self._others: SimpleQueue[Waiting] = SimpleQueue()
        self._commit_seconds = 0.0
        self._open: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer.submit(self._migrate).result()
        except sqlite3.DatabaseError as error:
            repair = REPAIR.format(path=path) if type(error) is sqlite3.DatabaseError else ""
            raise ArborError(f"cannot open the database {path}: {error}; nothing was changed.{repair}") from None
        except OSError as error:
            raise ArborError(f"cannot open the database {path}: {error}; nothing was changed") from None

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5)
            found.row_factory = sqlite3.Row
            found.execute("PRAGMA busy_timeout=5000")
            found.execute("PRAGMA synchronous=FULL")
            self._local.connection = found
            with self._lock:
                self._open.append(found)
        return found

    def _migrate(self) -> None:
        db = self._connection()
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        db.execute("PRAGMA journal_mode=WAL")
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise ArborError(f"{self.path} was written by a newer Arbor (schema {version}, this one knows {VERSION})")
        if version < VERSION:
            try:
                db.execute("BEGIN IMMEDIATE")
                for step in SCHEMA[version:]:
                    if callable(step):
                        step(db)
                    else:  # executescript would commit what came before
                        for statement in step.split(";"):
                            db.execute(statement)
                db.execute(f"PRAGMA user_version={VERSION}")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def read(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Rows of a query; sees everything that was committed before the call, and inside a change what its transaction
        has changed so far."""
        return self._connection().execute(sql, values).fetchall()

    def each(self, sql: str, *values: object) -> Iterator[sqlite3.Row]:
        """Rows of a query, read as they are wanted: for queries with many. All of them on one thread."""
        yield from self._connection().execute(sql, values)

    def one(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row of a query, if there is one."""
        row: sqlite3.Row | None = self._connection().execute(sql, values).fetchone()
        return row

    def write_now(self, sql: str, *values: object) -> None:
        """Make one change and wait for it: for what is done before anything else runs."""
        self._writer.submit(lambda: self._connection().execute(sql, values)).result()

    async def write(
        self, change: Callable[[sqlite3.Connection], T], committed: Callable[[], object] | None = None
    ) -> T:
        """Run `change` on the writer's thread; an exception in it undoes all that it did.

        It goes on even when the caller is cancelled: committed whole or not at all. Then `committed` is called, in the
        event loop.
        """
        done = asyncio.wrap_future(self._put(self._others if is_background() else self._requests, change))
        if committed:
            done.add_done_callback(lambda done: None if done.cancelled() or done.exception() else committed())
        return await asyncio.shield(done)

    def submit(self, change: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """The same for those who do not wait: behind requests, and in the order in which they are submitted."""
        return self._put(self._others, change)

    def _put(self, queue: SimpleQueue[Waiting], change: Callable[[sqlite3.Connection], T]) -> Future[T]:
        outcome: Future[T] = Future()
        queue.put((change, outcome))
        self._writer.submit(self._commit)
        return outcome

    def _commit(self) -> None:
        """Make the changes that wait in one transaction, then tell each caller what became of it."""
        batch = self._batch()
        first = next(batch, None)
        if first is None:  # an earlier call took it along
            return
        db, taken = self._connection(), [first]
        try:
            db.execute("BEGIN IMMEDIATE")
            outcomes = [_outcome(db, first[0])]
            for one in batch:
                taken.append(one)
                outcomes.append(_outcome(db, one[0]))
            crash_point("store.changed")
            began = time.monotonic()
            db.execute("COMMIT")
            self._commit_seconds = time.monotonic() - began
            crash_point("store.committed")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            outcomes = [(None, error)] * len(taken)
        for (_, future), (value, error_in_it) in zip(taken, outcomes, strict=True):
            if error_in_it is None:
                future.set_result(value)
            else:
                future.set_exception(error_in_it)

    def _batch(self) -> Iterator[Waiting]:
        """The changes of one transaction, as they are to be made: requests' first, also those that come meanwhile."""
        commit_at = float("inf")
        for _ in range(BATCH):
            found = _next(self._requests)
            if found:
                commit_at = min(commit_at, time.monotonic() + max(HURRY_SECONDS, self._commit_seconds))
            elif time.monotonic() < commit_at:
                found = _next(self._others)
            if found is None:
                return
            yield found

    def close(self) -> None:
        """Finish what is being written and close."""
        self._writer.shutdown()
        with self._lock:
            for connection in self._open:
                connection.close()


def _next(queue: SimpleQueue[Waiting]) -> Waiting | None:
    """The oldest change in a queue whose caller still waits for it."""
    while True:
        try:
            change, outcome = queue.get_nowait()
        except Empty:
            return None
        if outcome.set_running_or_notify_cancel():
            return change, outcome


def _outcome(db: sqlite3.Connection, change: Change) -> tuple[Any, BaseException | None]:
    """What a change returns, or raises; one that raises leaves nothing behind and does not touch the others.

    Raises:
        sqlite3.Error: SQLite itself gave the transaction up (a full disk): nobody's change was made.
    """
    db.execute("SAVEPOINT change")
    try:
        value = change(db)
    except BaseException as error:
        if not db.in_transaction:
            raise
        db.execute("ROLLBACK TO change")
        db.execute("RELEASE change")
        return None, error
    db.execute("RELEASE change")
    return value, None
