"""The states of a job, what can be desired of it, and what plugins see of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PROTOCOL = 2
"""Version of the job directory's layout; a worker refuses a directory of another one."""

Status = Literal[
    "validating_files",  # It was created, and its files are being validated.
    "queued",  # It waits for devices: for its first attempt, or for another one after a crash, a pause or preemption.
    "running",  # It holds devices, and an attempt trains on them, or begins or ends.
    "paused",  # It holds no devices and keeps its checkpoints until it is resumed.
    "succeeded",  # It ended with a model.
    "failed",  # It ended with an error.
    "cancelled",  # It ended because a client wanted it to, without a model.
]
"""Where a job is."""
Desired = Literal[
    "run",  # Train to the end.
    "pause",  # Write a checkpoint and give the devices back.
    "cancel",  # End at once.
    "finish",  # End with what was trained so far as the result; a job that has trained nothing is cancelled.
]
"""What the client wants of a job that has not ended; the dispatcher moves its status there."""
InputKind = Literal[
    "file",  # A training file, which is there when the job is created.
    "rollouts",  # Groups of rollouts that clients send while it runs.
    "commands",  # Commands that clients send while it runs, and get results of.
]
"""What a job learns from, as its trainer says."""
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
"""Statuses that never change."""


@dataclass
class JobView:
    """A job as plugins see it (`arbor_job_event`)."""

    id: str
    trainer: str
    model: str
    status: Status
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
