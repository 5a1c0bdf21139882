"""From the body of `POST /v1/fine_tuning/jobs` to a job: what was asked for is checked, completed and written down."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from arbor_core import ids
from arbor_core.config.convert import merged, typed
from arbor_core.jobdir import checkpoints
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.models import memory
from arbor_core.types import ApiError, ArborError, ConfigError

if TYPE_CHECKING:
    from arbor_core.models.catalog import Start

    from .system import Arbor

METHODS = ("supervised", "dpo", "reinforcement")
"""OpenAI's words for `method.type`; a trainer's own name is one too."""
SHOWN = ("n_epochs", "batch_size", "learning_rate_multiplier")
"""Hyperparameters that a job shows even when its author did not set them."""
MAX_SEED = 2_147_483_647
METADATA_PAIRS = 16
"""Most pairs that a job's metadata may have, and that a list may be asked for."""
_SUFFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Wandb(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Where Weights & Biases shows the job."""

    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["wandb"]
    wandb: Wandb


Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=METADATA_PAIRS),
]
Method = Annotated[
    dict[str, Any],
    Meta(
        extra_json_schema={
            "required": ["type"],
            "properties": {
                "type": {"type": "string", "description": f"{', '.join(METHODS)}, or the name of a trainer."},
                **{name: {"type": "object", "properties": {"hyperparameters": {"type": "object"}}} for name in METHODS},
            },
        }
    ),
]


class CreateFineTuningJobRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body. A method that learns from rollouts has no training file. `num_gpus` and `priority` (higher is more
    urgent, for the scheduler `priority`) are Arbor's own."""

    model: str
    training_file: str | None = None
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = None
    suffix: str | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Meta(max_length=5)] | None = None
    num_gpus: Annotated[int, Meta(ge=1)] = 1
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0


def prepare(arbor: Arbor, body: CreateFineTuningJobRequest, owner: str) -> tuple[NewJob, list[str]]:
    """The job that is asked for, and what its author should be warned of.

    Raises:
        ApiError, ConfigError: saying which field is wrong, and how.
    """
    method, trainer = chosen(arbor, body)
    given, where = hyperparameters_of(body, method)
    config = configured(arbor, trainer, given, where)
    check_suffix(body.suffix)
    learner = arbor.trainers[trainer].trainer
    if body.training_file is None and not learner.rollouts:
        message = "Missing required parameter: 'training_file'."
        raise ApiError(400, message, "missing_required_parameter", "training_file")
    start = arbor.models.trainable(body.model, owner, adapters=learner.adapters)
    check_files(arbor, body, owner, rollouts=learner.rollouts)
    check_devices(arbor, body.num_gpus)
    check_queue(arbor, arbor.jobs.count_waiting() + 1)
    keep_start(arbor, start)
    spec = JobSpec(
        trainer=trainer,
        method=method,
        config=config,
        model=start.name,
        model_path=start.path,
        seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
        suffix=body.suffix,
        integrations=None if body.integrations is None else msgspec.to_builtins(body.integrations),
        devices=body.num_gpus,
        rollouts=learner.rollouts,
        adapter_path=start.adapter,
    )
    shown = {name: config[name] for name in SHOWN if name in config} | given
    job = NewJob(owner, body.training_file or "", body.validation_file, body.metadata, shown, spec, body.priority)
    return job, [*warnings(body), *device_warnings(arbor, spec)]


def check_again(arbor: Arbor, body: CreateFineTuningJobRequest, owner: str, *, rollouts: bool) -> None:
    """What may have changed since `prepare`: called in the transaction that makes the job, the job being made already,
    so that of a job and the deletion of what it needs only one is answered well.

    Raises:
        ApiError: as `prepare`.
    """
    if body.model.startswith("ft:"):  # a base model is the operator's, and a job's checkpoints stay
        arbor.models.trainable(body.model, owner, adapters=True)
    check_files(arbor, body, owner, rollouts=rollouts)
    check_queue(arbor, arbor.jobs.count_waiting())


def chosen(arbor: Arbor, body: CreateFineTuningJobRequest) -> tuple[str, str]:
    """The method (OpenAI's word, or a trainer's name) and the trainer that answers to it."""
    preferred = arbor.default_trainer
    if body.method is None:
        methods = arbor.trainers[preferred].trainer.methods if preferred else ("supervised",)
        method = methods[0] if methods else str(preferred)
    elif isinstance(given := body.method.get("type"), str):
        method = given
    else:
        code = "invalid_type" if "type" in body.method else "missing_required_parameter"
        raise ApiError(400, f"'method.type' must be one of {', '.join(METHODS)}.", code, "method.type")
    try:
        trainer = arbor.plugins.trainer_for(method, preferred)
    except ArborError as error:
        code = "method_not_installed" if method in METHODS else "invalid_value"
        raise ApiError(400, f"{error}.", code, "method.type") from None
    return method, trainer


def hyperparameters_of(body: CreateFineTuningJobRequest, method: str) -> tuple[dict[str, Any], str]:
    """The hyperparameters as given, and the path under which they were."""
    where = f"method.{method}.hyperparameters"
    block = _block(body.method or {}, method)
    new = block.get("hyperparameters")
    if new is not None and not isinstance(new, dict):
        raise ApiError(400, f"Invalid '{where}': expected an object.", "invalid_type", where)
    if body.hyperparameters is None:
        return new or {}, where
    if new is not None and new != body.hyperparameters:
        message = f"'hyperparameters' and '{where}' differ: give only the latter."
        raise ApiError(400, message, "conflicting_parameters", "hyperparameters")
    return body.hyperparameters, "hyperparameters"


def _block(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The part of `method` that belongs to its type; nothing else may be in it."""
    for name, value in given.items():
        if name in ("type", method) or (value is None and name in METHODS):
            continue
        if name in METHODS:
            message = f"Invalid 'method.{name}': 'method.type' is '{method}', so only 'method.{method}' may be given."
            raise ApiError(400, message, "invalid_value", f"method.{name}")
        raise _unknown(f"method.{name}", name, ("type", method))
    block = given.get(method)
    if block is None:
        return {}
    if not isinstance(block, dict):
        raise ApiError(400, f"Invalid 'method.{method}': expected an object.", "invalid_type", f"method.{method}")
    for name in block:
        if name != "hyperparameters":
            raise _unknown(f"method.{method}.{name}", name, ("hyperparameters",))
    return block


def _unknown(path: str, name: str, known: tuple[str, ...]) -> ApiError:
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else f" Known here: {', '.join(known)}."
    return ApiError(400, f"Unknown parameter: '{path}'.{hint}", "unknown_parameter", path)


def configured(arbor: Arbor, trainer: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The trainer's whole configuration: what was given, over the server's defaults.

    Raises:
        ConfigError: a key that the trainer does not have, or a value it does not take.
    """
    defaults = arbor.trainers[trainer]
    try:
        config = typed(merged(defaults.values, given), defaults.trainer.config, where)
    except ConfigError as error:
        code = "invalid_value" if error.code.endswith("_below_min_value") else error.code
        raise ConfigError(str(error), path=error.path, code=code) from None
    return dict(msgspec.to_builtins(config, enc_hook=str))


def check_suffix(suffix: str | None) -> None:
    """A suffix becomes part of a model's name, so it may hold less than OpenAI's."""
    if suffix is not None and (not _SUFFIX.fullmatch(suffix) or ".." in suffix):
        message = "Invalid 'suffix': expected 1 to 64 letters, digits, '_', '.' or '-' (they become part of a name)."
        raise ApiError(400, message, "invalid_suffix", "suffix")


def check_files(arbor: Arbor, body: CreateFineTuningJobRequest, owner: str, *, rollouts: bool) -> None:
    """A job learns from a file, or from rollouts."""
    files = {"training_file": body.training_file, "validation_file": body.validation_file}
    for param, id in files.items():  # noqa: A001
        if id is not None and rollouts:
            message = f"'{param}' is not used by this method: it learns from the groups that are sent while it runs."
            raise ApiError(400, message, "invalid_value", param)
        if id is not None:
            check_file(arbor, id, owner, param)


def check_file(arbor: Arbor, id: str, owner: str, param: str) -> None:
    """A file that a job names must be its owner's and meant for training."""
    file = arbor.files.get(id, owner) if ids.plausible(id) else None
    if file is None:
        raise ApiError(400, f"File '{id[:80]}' does not exist: upload it first.", "file_not_found", param)
    if file.purpose != "fine-tune":
        message = f"File '{id}' was uploaded with purpose '{file.purpose}'; a job needs 'fine-tune'."
        raise ApiError(400, message, "invalid_file_purpose", param)


def keep_start(arbor: Arbor, start: Start) -> None:
    """Have the checkpoint that a job begins with stay, whatever the job that wrote it keeps."""
    for path in filter(None, (start.path, start.adapter)):
        if not checkpoints.hold((arbor.models.root / path).resolve()):
            raise ApiError(404, f"The weights of '{start.name}' were removed.", "model_not_found", "model")


def check_devices(arbor: Arbor, devices: int) -> None:
    """Refuse what can never run."""
    there, lost = arbor.allocator.inventory(), arbor.allocator.lost()
    pool = len(there.get("train", ())) + len(lost.get("train", ()))  # the job waits for those that are lost
    if devices > pool:
        message = f"Invalid 'num_gpus': {devices} are asked for, this server trains on {pool}."
        raise ApiError(400, message, "invalid_gpu", "num_gpus")


def check_queue(arbor: Arbor, waiting: int) -> None:
    """Refuse what makes the queue too long. `waiting`: how many jobs wait, the new one included."""
    limit = arbor.settings.limits.queued_jobs
    if waiting > limit:
        message = f"{limit} jobs are waiting already (limits.queued_jobs). Try again when some have begun."
        raise ApiError(429, message, "queue_full", headers={"retry-after": "30"})


def device_warnings(arbor: Arbor, spec: JobSpec) -> list[str]:
    """Whether the job needs more memory than a device has, as far as the size of the model tells, or more devices than
    are left."""
    there = arbor.allocator.inventory().get("train", ())
    found = memory.shortfall(
        Path(arbor.models.locate(spec.model, spec.model_path)),
        spec.config,
        min((device.memory for device in there), default=0),
    )
    said = [found] if found else []
    if spec.devices > len(there):
        gone = ", ".join(device.id for device in arbor.allocator.lost().get("train", ()))
        said.append(
            f"This job waits: it needs {spec.devices} devices, and this server has {len(there)}; {gone} is lost."
        )
    return said


def warnings(body: CreateFineTuningJobRequest) -> list[str]:
    """What is allowed and probably not meant."""
    found = []
    if body.validation_file and body.validation_file == body.training_file:
        found.append("The validation file is the training file: its loss says nothing about new data.")
    if body.integrations:
        found.append("No tracker is configured on this server: the integrations of this job are not used.")
    return found
