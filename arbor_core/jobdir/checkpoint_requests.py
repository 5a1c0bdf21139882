"""`asked/<name>.json` of a job's directory: checkpoints that clients wait for."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.storage.atomic import replace
from arbor_core.storage.codec import MAX_DEPTH, too_deep
from arbor_core.types import CheckpointRequest, ConfigError

from .layout import JobDir

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What a checkpoint may be called: it becomes the name of a file."""


def ask(job: JobDir, request: CheckpointRequest) -> Path:
    """Ask the job's worker for a checkpoint, now or when there is one again. The same name again replaces the request.

    Returns:
        A file that is there until the checkpoint is.

    Raises:
        ConfigError: the name cannot be one, or the metadata is nested too deeply.
    """
    check(request)
    path = job.checkpoint_requests / f"{request.name}.json"
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
    if too_deep(request.metadata):
        raise ConfigError(f"Invalid 'metadata': it is nested more than {MAX_DEPTH} deep.", path="metadata")


def asked(job: JobDir) -> list[CheckpointRequest]:
    """What was asked for and not yet answered, oldest first."""
    paths = sorted(job.checkpoint_requests.glob("[!.]*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [msgspec.json.decode(path.read_bytes(), type=CheckpointRequest) for path in paths]


def sizes(job: JobDir) -> dict[str, int]:
    """How much each request that is not yet answered holds, by its checkpoint's name."""
    found = {}
    for path in job.checkpoint_requests.glob("[!.]*.json"):
        with suppress(FileNotFoundError):  # it was answered
            found[path.stem] = path.stat().st_size
    return found


def answered(job: JobDir, request: CheckpointRequest) -> None:
    """Forget a request: its checkpoint was reported. Another one, which took its place meanwhile, stays."""
    path = job.checkpoint_requests / f"{request.name}.json"
    with suppress(FileNotFoundError):
        if msgspec.json.decode(path.read_bytes(), type=CheckpointRequest) == request:
            path.unlink()
