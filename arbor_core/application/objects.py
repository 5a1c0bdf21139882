"""OpenAI's objects and lists of them, made from rows. What OpenAI requires is there, null if it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from msgspec import UNSET, Struct, UnsetType

from arbor_core import ids
from arbor_core.files.repository import FileRow
from arbor_core.files.uploads import PartRow, UploadRow
from arbor_core.jobs.records import CheckpointRow, EventRow, Job
from arbor_core.models.catalog import Listed
from arbor_core.types import ApiError

PlaceT = TypeVar("PlaceT")


class FileObject(Struct):
    """OpenAI's `OpenAIFile`."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: Literal["file"] = "file"
    status: Literal["processed", "error"] = "processed"
    expires_at: int | UnsetType = UNSET
    status_details: str | UnsetType = UNSET


class FileList(Struct):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class Upload(Struct):
    """OpenAI's `Upload`; `file` is there once it is completed, until that file is deleted."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    object: Literal["upload"] = "upload"
    file: FileObject | UnsetType = UNSET


class UploadPart(Struct):
    id: str
    created_at: int
    upload_id: str
    object: Literal["upload.part"] = "upload.part"


class Deleted(Struct):
    id: str
    object: Literal["file", "model"]
    deleted: bool = True


class JobErrorObject(Struct):
    code: str
    message: str
    param: str | None


class FineTuningJob(Struct):
    """OpenAI's `FineTuningJob`. `status` may also be `paused`; `priority` is there if it is not 0."""

    id: str
    created_at: int
    error: JobErrorObject | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]] | None
    user_provided_suffix: str | None
    estimated_finish: int | None = None
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    priority: int | UnsetType = UNSET


class FineTuningJobList(Struct):
    data: list[FineTuningJob]
    has_more: bool
    object: Literal["list"] = "list"


class FineTuningJobEvent(Struct):
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    superseded: bool | UnsetType = UNSET
    """Arbor's: metrics of a step that a later attempt has made again."""


class FineTuningJobEventList(Struct):
    data: list[FineTuningJobEvent]
    has_more: bool
    object: Literal["list"] = "list"


class FineTuningJobCheckpoint(Struct):
    """OpenAI's `FineTuningJobCheckpoint`; `metrics` holds whatever the method measures, and `step`."""

    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"


class FineTuningJobCheckpointList(Struct):
    data: list[FineTuningJobCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class Model(Struct):
    id: str
    created: int
    owned_by: str
    object: Literal["model"] = "model"
    parent: str | UnsetType = UNSET
    """Arbor's: what the training of a fine-tuned model began with."""


class ModelList(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


def file_object(file: FileRow) -> FileObject:
    return FileObject(
        file.id,
        file.bytes,
        file.created_at,
        file.filename,
        file.purpose,
        status=file.status,
        expires_at=UNSET if file.expires_at is None else file.expires_at,
        status_details="The stored bytes are damaged." if file.status == "error" else UNSET,
    )


def upload_object(upload: UploadRow, file: FileRow | None) -> Upload:
    return Upload(
        upload.id,
        upload.bytes,
        upload.created_at,
        upload.expires_at,
        upload.filename,
        upload.purpose,
        upload.status,
        file=file_object(file) if file else UNSET,
    )


def part_object(part: PartRow) -> UploadPart:
    return UploadPart(part.id, part.created_at, part.upload_id)


def job_object(job: Job, organization: str) -> FineTuningJob:
    spec = job.spec
    return FineTuningJob(
        id=job.id,
        created_at=job.created_at,
        error=JobErrorObject(job.error.code, job.error.message, job.error.param) if job.error else None,
        fine_tuned_model=job.fine_tuned_model,
        finished_at=job.finished_at,
        hyperparameters=job.hyperparameters,
        method={"type": spec.method, spec.method: {"hyperparameters": job.hyperparameters}},
        model=spec.parent or spec.model,
        organization_id=organization,
        result_files=job.result_files,
        seed=spec.seed,
        status=job.status,
        trained_tokens=job.trained_tokens,
        training_file=job.training_file,
        validation_file=job.validation_file,
        metadata=job.metadata,
        integrations=spec.integrations,
        user_provided_suffix=spec.suffix,
        priority=job.priority or UNSET,
    )


def event_object(event: EventRow) -> FineTuningJobEvent:
    kind: Literal["message", "metrics"] = "metrics" if event.type == "metrics" else "message"
    superseded = True if event.superseded else UNSET
    return FineTuningJobEvent(
        event.id, event.created_at, event.level, event.message, kind, event.data or {}, superseded=superseded
    )


def checkpoint_object(checkpoint: CheckpointRow) -> FineTuningJobCheckpoint:
    return FineTuningJobCheckpoint(
        checkpoint.id,
        checkpoint.created_at,
        checkpoint.model,
        checkpoint.job_id,
        {"step": checkpoint.step, **checkpoint.metrics},
        checkpoint.step,
    )


def model_object(model: Listed, organization: str) -> Model:
    owner = organization if model.fine_tuned else "base"
    return Model(model.name, model.created_at, owner, parent=model.parent or UNSET)


def position(after: str | None, find: Callable[[str], PlaceT | None]) -> PlaceT | None:
    """Where in a list a page begins; None for the list's start.

    Args:
        after: The id of the last object of the page before.
        find: Gives the position of an object that may be in the list, by its id.

    Raises:
        ApiError: it is not in the list. The first page in its place would send a client round for ever.
    """
    if after is None:
        return None
    found = find(after) if ids.plausible(after) else None
    if found is None:
        message = f"Invalid 'after': there is no object '{after[:80]}' in this list."
        raise ApiError(400, message, "invalid_cursor", "after")
    return found
