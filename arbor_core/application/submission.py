"""From the body of `POST /v1/fine_tuning/jobs` to a new job: the request is checked and completed with defaults."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import ids
from arbor_core.config.convert import merged, renamed, typed
from arbor_core.config.settings import LimitsConfig
from arbor_core.files.repository import Files
from arbor_core.jobdir import checkpoints
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.models import memory
from arbor_core.models.catalog import Models, Start
from arbor_core.plugins import Plugins
from arbor_core.types import (
    Allocator,
    ApiError,
    ArborError,
    ConfigError,
    InputKind,
    TrainedWeights,
    Trainer,
    most_on_one_node,
)

from .continuing import continuing
from .requests import MAX_SEED, METHODS, CreateFineTuningJobRequest, check_suffix, hyperparameters_of, warnings
from .servable import ServableCheck

SHOWN = ("n_epochs", "batch_size", "learning_rate_multiplier")
"""Hyperparameters that a job shows even when its author did not set them."""


@dataclass(frozen=True)
class TrainerDefaults:
    """A trainer and what its configuration is before a client says anything."""

    trainer: Trainer
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Submission:
    """Checks requests for jobs against what this server has, and completes them."""

    plugins: Plugins
    trainers: Mapping[str, TrainerDefaults]
    default_trainer: str | None
    jobs: Jobs
    files: Files
    models: Models
    allocator: Allocator
    limits: LimitsConfig
    serving: ServableCheck

    def prepare(self, body: CreateFineTuningJobRequest, owner: str) -> tuple[NewJob, list[str]]:
        """The job that a request is for, and what its author should be warned of.

        Raises:
            ApiError, ConfigError: saying which field is wrong, and how.
        """
        method, name = self.choose_trainer(body)
        given, where = hyperparameters_of(body, method)
        trainer = self.trainers[name].trainer
        given, renamings = renamed(given, trainer.config, where)
        config = self.config_of(name, given, where)
        check_suffix(body.suffix)
        if body.training_file is None and trainer.input == "file":
            message = "Missing required parameter: 'training_file'."
            raise ApiError(400, message, "missing_required_parameter", "training_file")
        start = self.models.trainable(body.model, owner, adapters=trainer.adapters)
        if fixed := self.fixed_by(start, trainer):
            config = self.config_of(name, continuing(given, fixed, where, start.parent), where)
        trained = trainer.trained(config)
        self.check_servable(trained, start.name, where)
        self.check_files(body, owner, trainer.input)
        self.check_devices(body.num_gpus)
        self.check_queue(self.jobs.count_waiting() + 1)
        self.hold_start(start)
        spec = JobSpec(
            trainer=name,
            method=method,
            config=config,
            model=start.name,
            model_path=start.path,
            seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
            suffix=body.suffix,
            integrations=None if body.integrations is None else msgspec.to_builtins(body.integrations),
            devices=body.num_gpus,
            input=trainer.input,
            adapter_path=start.adapter,
            parent=start.parent,
            trains_adapter=trained.adapter is not None if trained else None,
        )
        shown = {key: config[key] for key in SHOWN if key in config} | given
        job = NewJob(owner, body.training_file or "", body.validation_file, body.metadata, shown, spec, body.priority)
        return job, [*renamings, *warnings(body), *self.device_warnings(spec)]

    def check_again(self, body: CreateFineTuningJobRequest, owner: str, input: InputKind) -> None:
        """Check what may have changed since `prepare`. Called in the transaction that creates the job, after its row is
        in, so that of a job and the deletion of what it needs only one succeeds.

        Raises:
            ApiError: as `prepare`.
        """
        if body.model.startswith("ft:"):  # a base model is the operator's, and a job's checkpoints stay
            self.models.trainable(body.model, owner, adapters=True)
        self.check_files(body, owner, input)
        self.check_queue(self.jobs.count_waiting())

    def choose_trainer(self, body: CreateFineTuningJobRequest) -> tuple[str, str]:
        """The method (OpenAI's word, or a trainer's name) and the name of the trainer that answers to it.

        Raises:
            ApiError: `method.type` is no text, or no trainer answers to it.
        """
        preferred = self.default_trainer
        if body.method is None:
            methods = self.trainers[preferred].trainer.methods if preferred else ("supervised",)
            method = methods[0] if methods else str(preferred)
        elif isinstance(given := body.method.get("type"), str):
            method = given
        else:
            code = "invalid_type" if "type" in body.method else "missing_required_parameter"
            raise ApiError(400, f"'method.type' must be one of {', '.join(METHODS)}.", code, "method.type")
        try:
            trainer = self.plugins.trainer_for(method, preferred)
        except ArborError as error:
            code = "method_not_installed" if method in METHODS else "invalid_value"
            raise ApiError(400, f"{error}.", code, "method.type") from None
        return method, trainer

    def config_of(self, trainer: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The trainer's whole configuration: what the client gave, over the server's defaults.

        Args:
            where: The path of what the client gave, for messages.

        Raises:
            ConfigError: a key that the trainer does not have, or a value it does not take.
        """
        defaults = self.trainers[trainer]
        try:
            config = typed(merged(defaults.values, given), defaults.trainer.config, where)
        except ConfigError as error:
            code = "invalid_value" if error.code.endswith("_below_min_value") else error.code
            raise ConfigError(str(error), path=error.path, code=code) from None
        return dict(msgspec.to_builtins(config, enc_hook=str))

    def fixed_by(self, start: Start, trainer: Trainer) -> Mapping[str, Any]:
        """What the adapter that a job begins with fixes of its configuration."""
        maker = self.jobs.get(start.maker) if start.adapter and start.maker else None
        if maker is None or start.adapter is None or trainer.continued is None:
            return {}
        return trainer.continued(self.models.root / start.adapter, maker.spec.config)

    def check_servable(self, trained: TrainedWeights | None, model: str, where: str) -> None:
        """Refuse a job whose result no engine could load, as far as its configuration tells.

        Args:
            trained: What it trains; None: not known.
            model: What it begins with.
            where: The path of the configuration, for messages.

        Raises:
            ConfigError: with the key and its value.
        """
        if trained and (found := self.serving.refusal(model, trained, where)):
            raise ConfigError(found[1], path=found[0])

    def check_files(self, body: CreateFineTuningJobRequest, owner: str, input: InputKind) -> None:
        """Refuse files that the job cannot learn from."""
        for param, id in (("training_file", body.training_file), ("validation_file", body.validation_file)):  # noqa: A001
            if id is not None and input != "file":
                what = {"rollouts": "the groups", "commands": "the commands"}[input]
                message = f"'{param}' is not used by this method: it learns from {what} that are sent while it runs."
                raise ApiError(400, message, "invalid_value", param)
            if id is not None:
                self.check_file(id, owner, param)

    def check_file(self, id: str, owner: str, param: str) -> None:
        """A file that a job names must be its owner's and meant for training."""
        file = self.files.get(id, owner) if ids.plausible(id) else None
        if file is None:
            raise ApiError(400, f"File '{id[:80]}' does not exist: upload it first.", "file_not_found", param)
        if file.purpose != "fine-tune":
            message = f"File '{id}' was uploaded with purpose '{file.purpose}'; a job needs 'fine-tune'."
            raise ApiError(400, message, "invalid_file_purpose", param)

    def hold_start(self, start: Start) -> None:
        """Have the checkpoint that a job begins with stay, whatever the job that wrote it keeps.

        Raises:
            ApiError: it is gone already.
        """
        for path in filter(None, (start.path, start.adapter)):
            if not checkpoints.hold((self.models.root / path).resolve()):
                raise ApiError(404, f"The weights of '{start.name}' were removed.", "model_not_found", "model")

    def check_devices(self, devices: int) -> None:
        """Refuse what can never run."""
        there, lost = self.allocator.inventory(), self.allocator.lost()
        whole = (*there.get("train", ()), *lost.get("train", ()))  # the job waits for those that are lost
        most = most_on_one_node(whole)
        if devices > most:
            message = f"Invalid 'num_gpus': {devices} are asked for, this server trains on {most}."
            raise ApiError(400, message, "invalid_gpu", "num_gpus")

    def check_queue(self, waiting: int) -> None:
        """Refuse what makes the queue too long. `waiting`: how many jobs wait, the new one included."""
        limit = self.limits.queued_jobs
        if waiting > limit:
            message = f"{limit} jobs are waiting already (limits.queued_jobs). Try again when some have begun."
            raise ApiError(429, message, "queue_full", headers={"retry-after": "30"})

    def device_warnings(self, spec: JobSpec) -> list[str]:
        """Whether the job needs more memory than a device has, as far as the size of the model tells, or more devices
        than are left."""
        there = self.allocator.inventory().get("train", ())
        smallest = min((device.memory for device in there), default=0)
        weights = Path(self.models.locate(spec.model, spec.model_path))
        shortfall = memory.shortfall(weights, spec.config, smallest, trains_all=spec.trains_all)
        found = [shortfall] if shortfall else []
        if spec.devices > (most := most_on_one_node(there)):
            gone = ", ".join(device.id for device in self.allocator.lost().get("train", ()))
            found.append(
                f"This job waits: it needs {spec.devices} devices, and this server has {most}; {gone} is lost."
            )
        return found
