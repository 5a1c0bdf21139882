"""Files that come in parts: each part lies under `<storage>/files/.parts/<id>` until all are joined into one file.

An upload is pending until it is completed, cancelled or expired, in one transaction each, and whoever is first wins.
A part has its bytes before its row, and loses its row before its bytes; what a crash leaves between is swept at start.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from typing import Literal
from weakref import WeakValueDictionary

import msgspec

from arbor_core import ids
from arbor_core.crash_points import crash_point
from arbor_core.process.resources import DISK_FULL_ERRNOS
from arbor_core.storage.atomic import TEMPORARY, sync_folder
from arbor_core.types import CLOSE, NO_RETRY, ApiError, not_found

from .concat import Joined, join
from .repository import Files, display_name, inserting
from .writer import Incoming, no_room, require_room, too_large

PART_BYTES = 64 << 20
"""Most bytes of a part, as OpenAI has it."""
MOST_PARTS = 10_000
"""Most parts of an upload."""
Outcome = Literal["completed", "cancelled", "expired"]


class UploadRow(msgspec.Struct, frozen=True):
    """One row of `uploads`."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    """Of the whole file, as its client announced them."""
    lifetime: int | None
    """Seconds that the file is to be kept."""
    created_at: int
    expires_at: int
    status: Literal["pending", "completed", "cancelled", "expired"]
    file_id: str | None
    part_ids: str | None
    """What it was completed from, as JSON."""


class PartRow(msgspec.Struct, frozen=True):
    """One row of `upload_parts`; gone when its upload is no longer pending."""

    id: str
    upload_id: str
    bytes: int
    created_at: int


class Uploads:
    """The uploads of one storage directory."""

    def __init__(self, files: Files) -> None:
        self.files, self.store, self.limits = files, files.store, files.limits
        self.parts_dir = files.root / ".parts"
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.parts_dir.mkdir(exist_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Remove what an earlier server left behind: bytes of parts that never got or lost their row."""
        kept = {row["id"] for row in self.store.read("SELECT id FROM upload_parts")}
        for path in self.parts_dir.iterdir():
            if path.name not in kept:
                path.unlink()

    async def create(self, owner: str, filename: str, size: int, purpose: str, lifetime: int | None) -> UploadRow:
        """Begin an upload of `size` bytes; `lifetime` is the file's, in seconds.

        Raises:
            ApiError: 413: it is too large. 507: there is no room for it.
        """
        if size > self.limits.upload_bytes:
            raise too_large(self.limits.upload_bytes, "bytes")
        require_room(self.parts_dir, size, self.limits.free_bytes)
        now = int(time.time())
        end = now + int(self.limits.upload_seconds)
        name = display_name(filename)
        new = UploadRow(
            ids.new("upload_"), owner, purpose, name, size, lifetime, now, end, "pending", file_id=None, part_ids=None
        )
        values = msgspec.structs.asdict(new)
        sql = f"INSERT INTO uploads({','.join(values)}) VALUES({','.join(f':{name}' for name in values)})"
        await self.store.write(lambda db: db.execute(sql, values))
        return new

    def get(self, id: str, owner: str) -> UploadRow | None:
        """An upload of this owner."""
        row = self.store.one("SELECT * FROM uploads WHERE id=? AND owner=?", id, owner)
        return decoded(row) if row else None

    def incoming(self) -> Incoming:
        """A place for a part on its way in."""
        most = min(PART_BYTES, self.limits.upload_bytes)
        return Incoming(self.files.incoming_dir, most, self.limits.free_bytes, "data")

    async def add(self, upload: UploadRow, part: Incoming) -> PartRow:
        """Give a part that has come in whole an id and a row.

        Raises:
            ApiError: the upload is no longer pending, or has too many parts or bytes.
        """
        row = PartRow(ids.new("part_"), upload.id, part.bytes, int(time.time()))
        await part.settle(self.parts_dir / row.id)

        def insert(db: sqlite3.Connection) -> None:
            require_pending(row_of(db, upload.id), time.time())
            sql = "SELECT count(*), ifnull(sum(bytes), 0) FROM upload_parts WHERE upload_id=?"
            count, size = db.execute(sql, (upload.id,)).fetchone()
            if count >= MOST_PARTS:
                raise ApiError(400, f"An upload may have {MOST_PARTS} parts: send larger ones.", "too_many_parts")
            if size + row.bytes > self.limits.upload_bytes:
                raise too_large(self.limits.upload_bytes, "data")
            db.execute("INSERT INTO upload_parts VALUES(?,?,?,?)", (row.id, row.upload_id, row.bytes, row.created_at))

        try:
            await self.store.write(insert)
        except (ApiError, sqlite3.Error):  # there will be no row
            (self.parts_dir / row.id).unlink(missing_ok=True)
            raise
        crash_point("part.stored")
        return row

    async def cancel(self, upload: UploadRow) -> UploadRow:
        """Give an upload up; what was cancelled before stays so.

        Raises:
            ApiError: it is completed or expired.
        """

        def change(db: sqlite3.Connection) -> list[str]:
            found = row_of(db, upload.id)
            if found.status != "cancelled":
                require_pending(found, time.time())
            return closed(db, upload.id, "cancelled")

        await self._remove(await self.store.write(change))
        return self._current(upload)

    async def complete(self, upload: UploadRow, part_ids: Sequence[str], md5: str | None = None) -> UploadRow:
        """Join parts, in this order, into the file. The same asked again is answered again.

        Raises:
            ApiError: 400: the upload is not pending, or the parts are not those of the file. 507: there is no room.
        """
        lock = self._locks.setdefault(upload.id, asyncio.Lock())
        async with lock:
            found, wanted = self._current(upload), msgspec.json.encode(part_ids).decode()
            if found.status == "completed" and found.part_ids == wanted:
                return found
            require_pending(found, time.time())
            self._check(found, part_ids)
            file_id = ids.new("file-")
            sha256 = await self._joined(found, file_id, part_ids, md5)
            insert = inserting(file_id, found.owner, found.purpose, found.filename, found.bytes, sha256, found.lifetime)

            def finish(db: sqlite3.Connection) -> list[str]:
                require_pending(row_of(db, upload.id))
                insert(db)
                return closed(db, upload.id, "completed", file_id, wanted)

            try:
                parts = await self.store.write(finish)
            except (ApiError, sqlite3.Error):  # there will be no row
                self.files.path(file_id).unlink(missing_ok=True)
                raise
            await self._remove(parts)
            return self._current(upload)

    def _check(self, upload: UploadRow, part_ids: Sequence[str]) -> None:
        """Whether these parts can be the file."""
        rows = self.store.read("SELECT id, bytes FROM upload_parts WHERE upload_id=?", upload.id)
        sizes: dict[str, int] = {row["id"]: row["bytes"] for row in rows}
        seen: set[str] = set()
        for part_id in part_ids:
            if part_id not in sizes or part_id in seen:
                reason = "comes twice" if part_id in seen else f"is no part of {upload.id}"
                message = f"Invalid 'part_ids': '{part_id[:80]}' {reason}. Name each part of the file once, in order."
                raise ApiError(400, message, "invalid_part_ids", "part_ids")
            seen.add(part_id)
        if (size := sum(sizes[part_id] for part_id in part_ids)) != upload.bytes:
            message = f"These parts have {size} bytes, but the upload was announced with {upload.bytes}."
            raise ApiError(400, message, "upload_size_mismatch", "part_ids")

    async def _joined(self, upload: UploadRow, file_id: str, part_ids: Sequence[str], md5: str | None) -> str:
        """Make the file durable under its id; returns its SHA-256."""
        require_room(self.parts_dir, upload.bytes, self.limits.free_bytes)
        temporary, target = self.files.incoming_dir / f"{file_id}{TEMPORARY}", self.files.path(file_id)
        parts = [self.parts_dir / part_id for part_id in part_ids]
        try:
            made = await asyncio.to_thread(join, parts, temporary, md5=md5 is not None)
            check_joined(upload, made, md5)
            crash_point("parts.joined")
            temporary.rename(target)
            crash_point("parts.renamed")
            await asyncio.to_thread(sync_folder, target.parent)
        except FileNotFoundError:
            require_pending(self._current(upload))  # it was cancelled meanwhile
            raise damaged(upload) from None
        except OSError as error:
            if error.errno in DISK_FULL_ERRNOS:
                raise no_room(str(error)) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return made.sha256

    async def expire(self) -> None:
        """Give up what has passed its `expires_at`, but not what is being completed."""
        sql = "SELECT id FROM uploads WHERE status='pending' AND expires_at<=?"
        due: list[str] = [row["id"] for row in self.store.read(sql, int(time.time()))]

        def change(db: sqlite3.Connection) -> list[str]:
            return [part for name in due if name not in self._locks for part in closed(db, name, "expired")]

        if due:
            await self._remove(await self.store.write(change))

    async def _remove(self, part_ids: Sequence[str]) -> None:
        """Remove the bytes of parts that have no row any more."""
        crash_point("upload.closed")

        def unlink() -> None:
            for part_id in part_ids:
                (self.parts_dir / part_id).unlink(missing_ok=True)

        await asyncio.to_thread(unlink)

    def _current(self, upload: UploadRow) -> UploadRow:
        """The upload as it is now."""
        found = self.get(upload.id, upload.owner)
        if found is None:
            raise not_found("upload", upload.id, "upload_not_found")
        return found


def row_of(db: sqlite3.Connection, upload_id: str) -> UploadRow:
    """An upload as it is in the caller's transaction."""
    return decoded(db.execute("SELECT * FROM uploads WHERE id=?", (upload_id,)).fetchone())


def decoded(row: sqlite3.Row) -> UploadRow:
    return msgspec.convert(dict(row), UploadRow)


def closed(
    db: sqlite3.Connection, upload_id: str, outcome: Outcome, file_id: str | None = None, part_ids: str | None = None
) -> list[str]:
    """End a pending upload; returns its parts, which have no row from then on. Part of the caller's transaction."""
    sql = "UPDATE uploads SET status=?, file_id=?, part_ids=? WHERE id=? AND status='pending'"
    if db.execute(sql, (outcome, file_id, part_ids, upload_id)).rowcount == 0:
        return []
    parts = [row[0] for row in db.execute("SELECT id FROM upload_parts WHERE upload_id=?", (upload_id,))]
    db.execute("DELETE FROM upload_parts WHERE upload_id=?", (upload_id,))
    return parts


def require_pending(upload: UploadRow, now: float | None = None) -> None:
    """Refuse what cannot be done to an upload any more; `now`: when it was asked, if that is to count.

    Raises:
        ApiError: it is completed, cancelled or expired.
    """
    status = "expired" if upload.status == "pending" and now and upload.expires_at <= now else upload.status
    if status != "pending":
        message = f"Upload {upload.id} is {status}: begin another one."
        raise ApiError(400, message, "upload_not_pending", "upload_id", CLOSE)


def check_joined(upload: UploadRow, made: Joined, md5: str | None) -> None:
    """Make sure that the parts were what they should be.

    Raises:
        ApiError: what is on the disk has another size, or another MD5 than its client has named.
    """
    if made.bytes != upload.bytes:
        raise damaged(upload)
    if md5 is not None and made.md5 != md5.strip().lower():
        message = f"The MD5 of these parts, in this order, is {made.md5}, not '{md5[:80]}'."
        raise ApiError(400, message, "md5_mismatch", "md5")


def damaged(upload: UploadRow) -> ApiError:
    message = f"The stored bytes of a part of upload {upload.id} are not those that came. Begin another upload."
    return ApiError(500, message, "file_corrupted", headers=NO_RETRY)
