"""Checkpoints: directories that a manifest vouches for.

A checkpoint is written into `<name>.tmp`, every file is made durable and its SHA-256 noted in `manifest.json`, and the
directory is renamed. So one without a manifest does not exist, and one whose files differ from it is not used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from .faults import crash_point
from .logs import replace, sync_folder
from .types import Checkpoint

MANIFEST = "manifest.json"


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
    """Yield a directory to write into; commit it as `folder` when the block ends without an exception."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        crash_point("checkpoint.written")
        manifest = Manifest(step, attempt, metrics, dict(_entries(temporary)))
        replace(temporary / MANIFEST, msgspec.json.encode(manifest))
        crash_point("checkpoint.vouched")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        crash_point("checkpoint.renamed")
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _entries(folder: Path) -> Iterator[tuple[str, FileEntry]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            yield str(path.relative_to(folder)), FileEntry(path.stat().st_size, digest)


def manifest(folder: Path) -> Manifest | None:
    """What the manifest says; None where there is none that can be read."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None if every file is what its manifest says."""
    said = manifest(folder)
    if said is None:
        return "no manifest"
    found = dict(_entries(folder))
    for name, entry in said.files.items():
        if found.get(name) != entry:
            return f"{name} is not what the manifest says"
    return None


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint under `folder` that is whole, and what was wrong with newer ones."""
    faults: list[str] = []
    for path in newest_first(folder):
        if reason := fault(path):
            faults.append(f"checkpoint {path.name} is not used: {reason}")
        elif said := manifest(path):
            return Checkpoint(said.step, path, said.metrics), faults
    return None, faults


def newest_bytes(folder: Path) -> int:
    """Size of the newest checkpoint under `folder`; 0 if there is none."""
    said = next(filter(None, map(manifest, newest_first(folder))), None)
    return sum(entry.bytes for entry in said.files.values()) if said else 0


def newest_first(folder: Path) -> list[Path]:
    """The committed checkpoints under `folder`, whole or not, by step and attempt."""
    found = [path for path in folder.glob("*-*") if path.is_dir() and path.suffix != ".tmp"] if folder.is_dir() else []
    return sorted(found, key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    step, _, attempt = path.name.partition("-")
    return (int(step), int(attempt)) if step.isdigit() and attempt.isdigit() else (-1, -1)
