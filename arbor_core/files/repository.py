"""Uploaded files: bytes under `<storage>/files/<id>`, a row in the database, never one without the other.

A file on its way in lives in `.incoming`; it is hashed and made durable, renamed to its id, and only then has a row.
The client's file name is shown and never used as a path.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from arbor_core import ids
from arbor_core.config.settings import LimitsConfig
from arbor_core.crash_points import crash_point
from arbor_core.jobs.states import NOT_ENDED
from arbor_core.storage.atomic import TEMPORARY, sync_folder
from arbor_core.storage.background import in_thread
from arbor_core.storage.database import Store
from arbor_core.types import NO_RETRY, ApiError, not_found

from .writer import BATCH_BYTES, Incoming

log = logging.getLogger(__name__)

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
"""What a client may upload a file for."""
ORPHAN_SECONDS = 3600.0
"""How old a file without a row must be before the sweep removes it."""


class FileRow(msgspec.Struct, frozen=True):
    """One row of `files`."""

    id: str
    seq: int
    owner: str
    purpose: str
    filename: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None
    status: Literal["processed", "error"]


class Files:
    """The files of one storage directory."""

    def __init__(self, store: Store, root: Path, limits: LimitsConfig) -> None:
        self.store, self.root, self.limits = store, root, limits
        self.incoming_dir = root / ".incoming"
        self._intact: dict[str, tuple[int, int, int]] = {}
        self.incoming_dir.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Remove what an earlier server left behind: unfinished uploads, and bytes that never got or lost their row."""
        for left in self.incoming_dir.iterdir():
            left.unlink()
        kept = {row["id"] for row in self.store.read("SELECT id FROM files WHERE deleted=0")}
        for path in self.root.iterdir():
            if path.is_file() and path.name not in kept and path.stat().st_mtime < time.time() - ORPHAN_SECONDS:
                path.unlink()

    def incoming(self, *, reserve: int | None = None) -> Incoming:
        """A place for a file on its way in: `async with files.incoming() as part`. `reserve`: bytes that must stay free
        on the disk; None: what `limits.free_bytes` says."""
        reserve = self.limits.free_bytes if reserve is None else reserve
        return Incoming(self.incoming_dir, self.limits.upload_bytes, reserve)

    async def commit(
        self, part: Incoming, owner: str, filename: str, purpose: str, lifetime: int | None = None
    ) -> FileRow:
        """Give a file that has come in whole an id and a row; `lifetime` is in seconds."""
        file_id, insert = await self.named(part, owner, filename, purpose, lifetime)
        try:
            row = await self.store.write(insert)
        except sqlite3.Error:  # there will be no row
            self.path(file_id).unlink(missing_ok=True)
            raise
        crash_point("upload.stored")
        return row

    async def named(
        self, part: Incoming, owner: str, filename: str, purpose: str, lifetime: int | None = None
    ) -> tuple[str, Callable[[sqlite3.Connection], FileRow]]:
        """Give a file that has come in whole an id; returns it, and what inserts its row in somebody's transaction."""
        file_id = ids.new("file-")
        sha256 = await part.settle(self.path(file_id))
        return file_id, inserting(file_id, owner, purpose, filename, part.bytes, sha256, lifetime)

    async def add_pieces(
        self, owner: str, filename: str, pieces: Iterable[bytes], purpose: str
    ) -> tuple[str, Callable[[sqlite3.Connection], FileRow]]:
        """Store a file that the server makes, for which the reserve is there; see `named` for what is returned. Its
        pieces are made one by one, on the thread that writes them.

        Raises:
            OSError: there is no room at all.
        """
        file_id = ids.new("file-")
        size, sha256 = await in_thread(self._write, file_id, pieces)
        return file_id, inserting(file_id, owner, purpose, filename, size, sha256)

    def _write(self, file_id: str, pieces: Iterable[bytes]) -> tuple[int, str]:
        """Make a file of ours durable, whole or not at all; returns its size in bytes and its SHA-256."""
        size, sha256 = 0, hashlib.sha256()
        part = self.incoming_dir / f"{file_id}{TEMPORARY}"
        try:
            with part.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                    sha256.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self.path(file_id))
        finally:
            part.unlink(missing_ok=True)
        sync_folder(self.root)
        return size, sha256.hexdigest()

    def get(self, id: str, owner: str) -> FileRow | None:
        """A file of this owner that is neither deleted nor expired."""
        row = self.store.one("SELECT * FROM files WHERE id=? AND owner=? AND deleted=0", id, owner)
        found = decoded(row) if row else None
        expired = found and found.expires_at is not None and found.expires_at <= time.time()
        return None if expired and not self.in_use(id) else found

    def path(self, id: str) -> Path:
        """Where a file's bytes are."""
        return self.root / id

    def stored_path(self, id: str) -> str:
        """Where a file's bytes are, as it is stored: relative to the storage directory."""
        return f"{self.root.name}/{id}"

    def page(
        self, owner: str, limit: int, after: int | None = None, *, purpose: str | None = None, ascending: bool = False
    ) -> list[FileRow]:
        """Files by arrival, newest first unless `ascending`, beyond `after` (a `seq`)."""
        where, values = ["owner=?", "deleted=0", "(expires_at IS NULL OR expires_at>?)"], [owner, int(time.time())]
        if after is not None:
            where.append("seq>?" if ascending else "seq<?")
            values.append(after)
        if purpose is not None:
            where.append("purpose=?")
            values.append(purpose)
        order = "ASC" if ascending else "DESC"
        sql = f"SELECT * FROM files WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?"  # noqa: S608 - our words
        return [decoded(row) for row in self.store.read(sql, *values, limit)]

    def seq(self, id: str, owner: str) -> int | None:
        """Where a file stands in the list; that of a deleted file is still a valid cursor."""
        row = self.store.one("SELECT seq FROM files WHERE id=? AND owner=?", id, owner)
        return int(row[0]) if row else None

    def in_use(self, id: str) -> bool:
        """Whether a job that has not ended needs the file."""
        return self.store.one(IN_USE, id, id) is not None

    async def delete(self, id: str, owner: str) -> None:
        """Forget a file.

        Raises:
            ApiError: there is no such file, or a job that has not ended needs it.
        """

        def mark(db: sqlite3.Connection) -> str | None:
            row = db.execute("SELECT 1 FROM files WHERE id=? AND owner=? AND deleted=0", (id, owner)).fetchone()
            if row is None:
                raise not_found("file", id, "file_not_found")
            if job := db.execute(IN_USE, (id, id)).fetchone():
                return str(job[0])
            db.execute("UPDATE files SET deleted=1 WHERE id=?", (id,))
            return None

        if job_id := await self.store.write(mark):
            raise ApiError(400, f"File {id} is used by job {job_id}: cancel it, or wait for its end.", "file_in_use")
        await asyncio.to_thread(self.path(id).unlink, missing_ok=True)

    async def expire(self) -> None:
        """Delete what has passed its `expires_at`, but not what a job needs.

        Whoever asks for something else meanwhile is not to hear of it: others may be faster, and what cannot be deleted
        now is left to the next call, or to the sweep.
        """
        now = int(time.time())
        if self.store.one(f"{EXPIRED} LIMIT 1", now) is None:
            return

        def mark(db: sqlite3.Connection) -> list[str]:
            due = db.execute(EXPIRED, (now,)).fetchall()
            db.executemany("UPDATE files SET deleted=1 WHERE id=?", due)
            return [row[0] for row in due]

        try:
            for file_id in await self.store.write(mark):
                await asyncio.to_thread(self.path(file_id).unlink, missing_ok=True)
        except (sqlite3.Error, OSError) as error:
            log.warning("files that have expired were not removed: %s", error)

    async def read(self, file: FileRow) -> AsyncIterator[bytes]:
        """The bytes, in pieces. Call `check` before."""
        handle = await asyncio.to_thread(self.path(file.id).open, "rb")
        with handle:
            while piece := await asyncio.to_thread(handle.read, BATCH_BYTES):
                yield piece

    async def check(self, file: FileRow) -> None:
        """Make sure that the stored bytes are those that came. They are hashed once for every inode, size and time.

        Raises:
            ApiError: they are gone, or others; the file's status is `error` from then on.
        """
        path = self.path(file.id)
        try:
            stat = path.stat()
            identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._intact.get(file.id) == identity:
                return
            intact = stat.st_size == file.bytes and await asyncio.to_thread(sha256, path) == file.sha256
        except FileNotFoundError:
            await self._mark_broken(file.id)
            raise not_found("the content of file", file.id, "file_not_found") from None
        if not intact:
            await self._mark_broken(file.id)
            message = f"The stored bytes of file {file.id} are not those that were uploaded. Upload the file again."
            raise ApiError(500, message, "file_corrupted", headers=NO_RETRY)
        self._intact[file.id] = identity

    async def _mark_broken(self, id: str) -> None:
        await self.store.write(lambda db: db.execute("UPDATE files SET status='error' WHERE id=?", (id,)))


IN_USE = f"SELECT id FROM jobs WHERE (training_file=? OR validation_file=?) AND {NOT_ENDED}"  # noqa: S608
EXPIRED = (
    "SELECT id FROM files f WHERE deleted=0 AND expires_at<=? AND NOT EXISTS(SELECT 1 FROM jobs"  # noqa: S608
    f" WHERE (training_file=f.id OR validation_file=f.id) AND {NOT_ENDED})"
)


def inserting(
    file_id: str, owner: str, purpose: str, filename: str, size: int, sha256: str, lifetime: int | None = None
) -> Callable[[sqlite3.Connection], FileRow]:
    """What gives a file its row; `lifetime` is in seconds."""
    now = int(time.time())
    values = {
        "id": file_id,
        "owner": owner,
        "purpose": purpose,
        "filename": display_name(filename),
        "bytes": size,
        "sha256": sha256,
        "created_at": now,
        "expires_at": None if lifetime is None else now + lifetime,
        "status": "processed",
    }
    marks = ",".join(f":{name}" for name in values)

    def insert(db: sqlite3.Connection) -> FileRow:
        db.execute(f"INSERT INTO files({','.join(values)}) VALUES({marks})", values)
        return decoded(db.execute("SELECT * FROM files WHERE id=?", (file_id,)).fetchone())

    return insert


def decoded(row: sqlite3.Row) -> FileRow:
    return msgspec.convert(dict(row), FileRow)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def display_name(name: str) -> str:
    """A client's file name as it is shown: the last part of the path, composed (NFC), nothing invisible, 255 bytes."""
    base = name.replace("\\", "/").rpartition("/")[2]
    seen = "".join(
        c for c in unicodedata.normalize("NFC", base) if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )
    cut = seen.encode()[:255].decode(errors="ignore").strip()
    return cut if cut.strip(".") else "upload"
