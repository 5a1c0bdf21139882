"""The body of `POST /v1/fine_tuning/jobs`, and the checks that need nothing but it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from arbor_core.types import ApiError

METHODS = ("supervised", "dpo", "reinforcement")
"""OpenAI's words for `method.type`; a trainer's own name is one too."""
MAX_SEED = 2_147_483_647
METADATA_PAIRS = 16
"""Most pairs that a job's metadata may have, and that a list of jobs may be filtered by."""
SUFFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")


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


def check_suffix(suffix: str | None) -> None:
    """A suffix becomes part of a model's name, so it may hold less than OpenAI's."""
    if suffix is not None and (not SUFFIX.fullmatch(suffix) or ".." in suffix):
        message = "Invalid 'suffix': expected 1 to 64 letters, digits, '_', '.' or '-' (they become part of a name)."
        raise ApiError(400, message, "invalid_suffix", "suffix")


def warnings(body: CreateFineTuningJobRequest) -> list[str]:
    """What is allowed and probably not meant."""
    found = []
    if body.validation_file and body.validation_file == body.training_file:
        found.append("The validation file is the training file: its loss says nothing about new data.")
    if body.integrations:
        found.append("No tracker is configured on this server: the integrations of this job are not used.")
    return found
