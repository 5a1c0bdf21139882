"""The rows of the tables of jobs as structs, and how they get in and out of the database."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from arbor_core.types import Desired, InputKind, Level, Status


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed, as the API shows it."""

    code: str
    message: str
    param: str | None = None


class JobSpec(msgspec.Struct, frozen=True):
    """The request that created the job, with all its names resolved. Never changes."""

    trainer: str
    method: str
    """OpenAI's `method.type`."""
    config: dict[str, Any]
    model: str
    """Public name of the base model."""
    model_path: str | None
    """Weights that another job trained: their path in the storage directory. None: the base model of this name, which
    is looked up whenever it is needed."""
    seed: int
    suffix: str | None = None
    integrations: list[dict[str, Any]] | None = None
    devices: int = 1
    rows: dict[str, int] = {}
    input: InputKind = "file"
    """What it learns from; only `file` has a training file."""
    adapter_path: str | None = None
    """The adapter that it starts from: its path in the storage directory."""
    trains_adapter: bool | None = None
    """What its trainer said of the configuration (`Trainer.adapter`); None: nothing."""
    parent: str | None = None
    """Public name of the fine-tuned model that it trains further; None: a base model, `model`."""

    @property
    def trains_all(self) -> bool:
        """Whether it trains all weights, as far as is known."""
        return trains_all_weights(self.trains_adapter, self.config)


def trains_all_weights(trains_adapter: bool | None, config: Mapping[str, Any]) -> bool:
    """`JobSpec.trains_all` of a specification's parts."""
    if trains_adapter is None:  # a specification of a version before `trains_adapter`: by the key that trainers shared
        return "lora" in config and config["lora"] is None
    return not trains_adapter


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
    """Empty: it has none; it learns from what clients send."""
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
    """How much of the attempt's event log is in the database, in bytes."""
    progress: int
    """Highest step of a checkpoint that is there."""
    furthest: int
    """Highest step of any checkpoint ever: to write one again that was found to be damaged is no progress."""
    crashes: int
    """How many attempts in a row died without progress."""
    memory_retries: int
    """How many attempts ran out of memory and were followed by one with smaller micro-batches."""
    preempted: int
    """1 while the scheduler wants the running job's devices for another."""
    turn: int
    """How many attempts of all jobs had been started when the job was queued, or with its own when that began."""
    waited: int
    """How many attempts were started while the job was queued, not counting the last time that it was queued."""

    @property
    def instruction(self) -> Desired:
        """What the worker is to do: what is desired of the job, or pause while the scheduler preempts it."""
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
    superseded: int = 0
    """1: metrics of a step that a later attempt has made again."""


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
    """The columns that `Jobs.create` sets."""

    owner: str
    training_file: str
    validation_file: str | None
    metadata: dict[str, str] | None
    hyperparameters: dict[str, Any]
    spec: JobSpec
    priority: int = 0


def to_json(value: Any) -> str | None:
    """JSON text for a column; None stays None (SQL's NULL)."""
    return None if value is None else msgspec.json.encode(value).decode()


def _values(row: sqlite3.Row, json_columns: Sequence[str]) -> dict[str, Any]:
    return {
        name: msgspec.json.decode(row[name]) if name in json_columns and row[name] is not None else row[name]
        for name in row.keys()  # noqa: SIM118 - a Row iterates over values
    }


def job_from_row(row: sqlite3.Row) -> Job:
    return msgspec.convert(_values(row, JSON_COLUMNS), Job)


def event_from_row(row: sqlite3.Row) -> EventRow:
    return msgspec.convert(_values(row, ("data",)), EventRow)


def checkpoint_from_row(row: sqlite3.Row) -> CheckpointRow:
    return msgspec.convert(_values(row, ("metrics",)), CheckpointRow)


def insert_job(db: sqlite3.Connection, job_id: str, new: NewJob) -> Job:
    """Insert the row of a new job; part of the caller's transaction."""
    values = {
        "id": job_id,
        "owner": new.owner,
        "status": "validating_files",
        "created_at": int(time.time()),
        "priority": new.priority,
        "training_file": new.training_file,
        "validation_file": new.validation_file,
        "metadata": to_json(new.metadata),
        "spec": to_json(new.spec),
        "hyperparameters": to_json(new.hyperparameters),
    }
    marks = ",".join(f":{name}" for name in values)
    db.execute(f"INSERT INTO jobs({','.join(values)}) VALUES({marks})", values)
    return job_from_row(db.execute("SELECT * FROM jobs WHERE id=?", (job_id,)).fetchone())
