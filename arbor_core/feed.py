"""A worker's side of learning from rollouts: groups that arrive, weights that go out, checkpoints that clients name.

Everything goes through the job's directory: `inbox/` (see `inbox`), `weights/<version>-<attempt>/`, and
`asked/<name>.json` for each checkpoint that a client waits for.
"""

from __future__ import annotations

import re
import select
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from . import inbox
from .bell import short
from .convert import NESTED, nested
from .faults import crash_point
from .logs import replace
from .types import CheckpointRequest, ConfigError

KEPT = 4
"""Published versions that stay on the disk: engines load a version soon after it was published, or never."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What a checkpoint may be called: it becomes the name of a file."""


class Feed:
    """The reading end of a job's inbox, with a bell that is rung when something was appended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bell = folder, folder / "bell"
        folder.mkdir(parents=True, exist_ok=True)
        self.bell.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with short(self.bell) as address:
            self.socket.bind(address)

    def take(self, position: int, wait: float, until: int | None = None) -> list[inbox.Record]:
        """The records from a position on, and before `until`; waits up to `wait` seconds for the first, or until the
        bell rings for something else.

        Raises:
            InboxDamagedError: a record is not what was written.
        """
        found = self._there(position, until)
        if not found and wait > 0:
            self._listen(wait)
            found = self._there(position, until)
        return found

    def _there(self, position: int, until: int | None) -> list[inbox.Record]:
        ends = [end for end in (inbox.synced(self.folder), until) if end is not None]
        return list(inbox.read(self.folder, position, min(ends, default=None)))

    def _listen(self, seconds: float) -> None:
        ready, _, _ = select.select([self.socket], [], [], seconds)
        while ready:
            try:
                self.socket.recv(256)
            except BlockingIOError:
                return


@contextmanager
def publishing(folder: Path, name: str) -> Iterator[Path]:
    """Yield a directory to write a version into; it is `folder/name` when the block ends. Older ones go.

    Not synced: after a power failure the trainer publishes again from its checkpoint.
    """
    temporary = folder / f"{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        crash_point("weights.written")
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        crash_point("weights.renamed")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(folder.iterdir(), key=_newness, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _newness(path: Path) -> tuple[int, int]:
    """Version and attempt. The newest version is served, though an attempt that began before it publishes again."""
    version, _, attempt = path.name.removesuffix(".tmp").partition("-")
    return int(version), int(attempt)


def ask(job_dir: Path, request: CheckpointRequest) -> Path:
    """Ask the job's worker for a checkpoint, now or when there is one again. The same name again replaces the request.

    Returns:
        A file that is there until the checkpoint is.

    Raises:
        ConfigError: the name cannot be one, or the metadata is nested too deeply.
    """
    check(request)
    path = job_dir / "asked" / f"{request.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, msgspec.json.encode(request))
    crash_point("checkpoint.asked")
    return path


def check(request: CheckpointRequest) -> None:
    """Whether a checkpoint may be called so, and this be kept with it.

    Raises:
        ConfigError: it may not.
    """
    if not NAME.fullmatch(request.name) or request.name.startswith("."):
        message = (
            "Invalid 'checkpoint_name': expected 1 to 64 letters, digits, '_', '.' or '-', not beginning with '.'."
        )
        raise ConfigError(message, path="checkpoint_name")
    if nested(request.metadata):
        raise ConfigError(f"Invalid 'metadata': it is nested more than {NESTED} deep.", path="metadata")


def asked(job_dir: Path) -> list[CheckpointRequest]:
    """What was asked for and not yet answered, oldest first."""
    paths = sorted((job_dir / "asked").glob("[!.]*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [msgspec.json.decode(path.read_bytes(), type=CheckpointRequest) for path in paths]


def sizes(job_dir: Path) -> dict[str, int]:
    """How much each request that is not yet answered holds, by its checkpoint's name."""
    found = {}
    for path in (job_dir / "asked").glob("[!.]*.json"):
        with suppress(FileNotFoundError):  # it was answered
            found[path.stem] = path.stat().st_size
    return found


def answered(job_dir: Path, name: str) -> None:
    """Forget a request: its checkpoint was reported."""
    (job_dir / "asked" / f"{name}.json").unlink(missing_ok=True)
