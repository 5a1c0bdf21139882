"""What an attempt is told of its job: `job.json`, what the names in it stand for, and `desired`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.types import ArborError, Desired


class WorkOrder(msgspec.Struct, frozen=True):
    """`job.json`: all that an attempt needs to know of its job. Written once."""

    protocol: int
    job_id: str
    entry: str
    config_type: str
    config: dict[str, Any]
    check_row: str
    min_rows: int
    model: str
    """Directory or hub id of the base model."""
    model_name: str
    """Its public name."""
    training_file: Path
    """An empty file where the job has none."""
    validation_file: Path | None
    seed: int
    created_at: float
    versions: dict[str, str]
    """Of the installed libraries that matter for the outcome, by distribution."""
    threads: int
    cpu: str
    """Instruction set: AVX2 and AVX-512 give different last bits. Empty: not known."""
    adapter: Path | None = None
    """Adapter to start from."""


def imported(path: str) -> Any:
    """The object that `"package.module:name"` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def desired(job_dir: Path) -> Desired:
    """What the job is asked to do now: a level, not a queue.

    Raises:
        ArborError: the file says something else.
    """
    try:
        word = (job_dir / "desired").read_text().strip()
    except FileNotFoundError:
        return "run"
    if word not in ("run", "pause", "cancel", "finish"):
        raise ArborError(f"{job_dir / 'desired'} says {word!r}; expected run, pause, cancel or finish")
    return word  # type: ignore[return-value]
