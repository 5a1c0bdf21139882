"""The rows of the tables about jobs, as structs."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from arbor_core.types import Desired, Level, Status


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed, as the API shows it."""

    code: str
    message: str
    param: str | None = None


class JobSpec(msgspec.Struct, frozen=True):
    """What was asked for, resolved when the job was created. Never changes."""

    trainer: str
    method: str
    """OpenAI's `method.type`."""
    config: dict[str, Any]
    model: str
    """Public name of the base."""
    model_path: str | None
    """Weights that a job has made: their path in the storage directory. None: the base model of this name, which is
    looked for anew whenever it is needed."""
    seed: int
    suffix: str | None = None
    integrations: list[dict[str, Any]] | None = None
    devices: int = 1
    rows: dict[str, int] = {}
    rollouts: bool = False
    """It learns from groups that clients send, and has no training file."""
    adapter_path: str | None = None
    """The adapter that it starts from: its path in the storage directory."""


class Job(msgspec.Struct):
    """One row of `jobs`."""

    id: str
    seq: int
    owner: str
    status: Status
    desired: Desired
    attempt: int
    priority: int
    created_at: int
    finished_at: int | None
    training_file: str
    """Empty: it has none."""
    validation_file: str | None
    fine_tuned_model: str | None
    metadata: dict[str, str] | None
    spec: JobSpec
    hyperparameters: dict[str, Any]
    error: JobError | None
    trained_tokens: int | None
    result_files: list[str]
    ref: str | None
    offset: int
    """Bytes of the attempt's event log that are in the database."""
    progress: int
    """Highest step that a checkpoint holds."""
    furthest: int
    """Highest step that a checkpoint ever held: writing again what was found to be damaged is no progress."""
    crashes: int
    """Attempts that died since the last progress."""
    memory_retries: int
    """Attempts that ran out of memory and were followed by one with smaller micro-batches."""
    preempted: int
    """1 while the scheduler wants the running job's devices for another."""
    turn: int
    """How many attempts the server had started when the job was queued, or with its own when that was started."""
    waited: int
    """How many attempts were started while the job was queued, before it was queued the last time."""

    @property
    def wanted(self) -> Desired:
        """What the worker is to do: what was asked of the job, unless the scheduler has it make room."""
        return "pause" if self.desired == "run" and self.preempted else self.desired


JSON_COLUMNS = ("metadata", "spec", "hyperparameters", "error", "result_files")


class EventRow(msgspec.Struct, frozen=True):
    """One row of `events`, newest last by `seq`."""

    id: str
    seq: int
    created_at: int
    level: Level
    type: str
    message: str
    data: dict[str, Any] | None


class CheckpointRow(msgspec.Struct, frozen=True):
    """One row of `checkpoints`."""

    id: str
    seq: int
    job_id: str
    created_at: int
    step: int
    dir: str
    model: str
    metrics: dict[str, float]


class NewJob(msgspec.Struct, frozen=True):
    """What `Jobs.create` needs."""

    owner: str
    training_file: str
    validation_file: str | None
    metadata: dict[str, str] | None
    hyperparameters: dict[str, Any]
    spec: JobSpec
    priority: int = 0


def to_json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _plain(row: sqlite3.Row, json_columns: Sequence[str]) -> dict[str, Any]:
    return {
        name: msgspec.json.decode(row[name]) if name in json_columns and row[name] is not None else row[name]
        for name in row.keys()  # noqa: SIM118 - a Row iterates over values
    }


def job_from_row(row: sqlite3.Row) -> Job:
    return msgspec.convert(_plain(row, JSON_COLUMNS), Job)


def event_from_row(row: sqlite3.Row) -> EventRow:
    return msgspec.convert(_plain(row, ("data",)), EventRow)


def checkpoint_from_row(row: sqlite3.Row) -> CheckpointRow:
    return msgspec.convert(_plain(row, ("metrics",)), CheckpointRow)
