"""Checkpoints: directories that a manifest vouches for.

A checkpoint is written into `<name>.tmp`, every file is made durable and its SHA-256 noted in `manifest.json`, and the
directory is renamed. So one without a manifest does not exist, and one whose files differ from it is not used: it is
withdrawn and set aside as `<name>.damaged`, because what is left of it may be all that somebody has.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.process.resources import DiskFullError, is_disk_full
from arbor_core.storage.atomic import TEMPORARY, replace, replace_link, sync_folder
from arbor_core.types import Checkpoint, CheckpointWithdrawn

MANIFEST = "manifest.json"
NAMED = "named"
"""Folder of links to checkpoints that clients gave names."""
HELD = "held"
"""Folder of links to checkpoints that other jobs began with."""
DAMAGED = ".damaged"


class FileEntry(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    step: int
    attempt: int
    metrics: dict[str, float]
    files: dict[str, FileEntry]


@contextmanager
def writing(folder: Path, step: int, attempt: int, metrics: dict[str, float]) -> Iterator[Path]:
    """Yield a directory to write into; commit it as `folder` when the block ends without an exception.

    Raises:
        DiskFullError: there was no room for all of it. Nothing of it is left.
    """
    temporary = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        crash_point("checkpoint.written")
        manifest = Manifest(step, attempt, metrics, durable(temporary))
        replace(temporary / MANIFEST, msgspec.json.encode(manifest))
        crash_point("checkpoint.vouched")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        crash_point("checkpoint.renamed")
        sync_folder(folder.parent)
    except Exception as error:
        if is_disk_full(error, folder.parent):  # asked before what was written makes room again
            raise DiskFullError(errno.ENOSPC, f"no room for a checkpoint ({error})", str(folder)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def durable(folder: Path) -> dict[str, FileEntry]:
    """Bring all that is under `folder` to the disk; returns its files by their paths relative to it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.is_file():  # no dangling link
            sync_folder(path)  # a file is synced in the same way
        if path.is_file():
            found[str(path.relative_to(folder))] = _entry(path)
    return found


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(os.fstat(file.fileno()).st_size, digest)


def manifest(folder: Path) -> Manifest | None:
    """What the manifest says; None where there is none that can be read."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def fault(folder: Path, *, sizes_only: bool = False) -> str | None:
    """Why a checkpoint cannot be trusted, or None if every file is what its manifest says.

    Args:
        sizes_only: Do not read the files: finds those that are missing or cut short, in no time.
    """
    said = manifest(folder)
    if said is None:
        return "no manifest"
    for name, entry in said.files.items():
        path = folder / name
        try:
            same = path.stat().st_size == entry.bytes and (sizes_only or _entry(path) == entry)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} is not what the manifest says"
    return None


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[CheckpointWithdrawn]]:
    """The newest checkpoint under `folder` that is whole, and the withdrawals of newer ones."""
    withdrawals: list[CheckpointWithdrawn] = []
    for path in newest_first(folder):
        if reason := fault(path):
            withdrawals.append(withdrawal(path, reason))
        elif said := manifest(path):
            return Checkpoint(said.step, path, said.metrics), withdrawals
    return None, withdrawals


def whole_of(folder: Path, step: int) -> Checkpoint | None:
    """The newest checkpoint of a step under `folder` that is whole."""
    for path in newest_first(folder):
        if _order(path)[0] == step and not fault(path) and (said := manifest(path)):
            return Checkpoint(said.step, path, said.metrics)
    return None


def withdrawal(folder: Path, reason: str) -> CheckpointWithdrawn:
    """Tells that a checkpoint is damaged and not offered any more. To be written before it is set aside."""
    text = f"checkpoint {folder.name} is not used: {reason}. What is left of it is kept as {folder.name}{DAMAGED}"
    return CheckpointWithdrawn(text, "error", dir=folder.name)


def set_aside(folder: Path) -> None:
    """Take a damaged checkpoint out of the way."""
    folder.rename(folder.with_name(folder.name + DAMAGED))
    sync_folder(folder.parent)


def aside(folder: Path) -> list[Path]:
    """The damaged checkpoints under `folder` that were set aside."""
    return sorted(folder.glob(f"*-*{DAMAGED}"))


def superseded(folder: Path, count: int) -> list[Path]:
    """All checkpoints under `folder` but those with names, those that other jobs began with and the newest `count`
    others, and damaged ones that are not newer than these."""
    kept = {path.resolve().name for links in (NAMED, HELD) for path in (folder / links).glob("*")}
    committed = [path for path in newest_first(folder) if path.name not in kept]
    newest = _order(committed[0]) if committed else (-1, -1)
    return [*committed[count:], *(path for path in aside(folder) if _order(path) <= newest)]


def newest_bytes(folder: Path) -> int:
    """Size of the newest checkpoint under `folder`; 0 if there is none."""
    said = next(filter(None, map(manifest, newest_first(folder))), None)
    return sum(entry.bytes for entry in said.files.values()) if said else 0


def newest_first(folder: Path) -> list[Path]:
    """The committed checkpoints under `folder`, whole or not, by step and attempt."""
    found = [path for path in folder.glob("*-*") if path.is_dir() and path.suffix not in (TEMPORARY, DAMAGED)]
    return sorted(found, key=_order, reverse=True)


def give_name(folder: Path, name: str, step: int) -> Path:
    """Give the newest checkpoint of a step under `folder` a name, in place of another that had it; its directory."""
    path = next(path for path in newest_first(folder) if _order(path)[0] == step)
    link = folder / NAMED / name
    link.parent.mkdir(exist_ok=True)
    replace_link(link, Path("..") / path.name)
    return path


def hold(folder: Path) -> bool:
    """Keep a checkpoint for good, because another job begins with it; whether it is there."""
    link = folder.parent / HELD / folder.name
    link.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        link.symlink_to(Path("..") / folder.name)
    return folder.is_dir()


def _order(path: Path) -> tuple[int, int]:
    step, _, attempt = path.name.removesuffix(DAMAGED).partition("-")
    return (int(step), int(attempt)) if step.isdigit() and attempt.isdigit() else (-1, -1)
