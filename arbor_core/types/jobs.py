"""The states of a job, what it can be asked for, and what plugins see of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PROTOCOL = 2
"""Version of the job directory's layout; a worker refuses a directory of another one."""

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Desired = Literal["run", "pause", "cancel", "finish"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


@dataclass
class JobView:
    """A job as plugins see it (`arbor_job_event`)."""

    id: str
    trainer: str
    model: str
    status: Status
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
