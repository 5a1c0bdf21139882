"""What clients send to GRPO's routes, typed: three generations of them.

Unknown keys are left alone, because these clients send many; what is used is checked.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

import msgspec
from litestar import Request
from msgspec import UNSET, Meta, Struct

from arbor_core.http import ApiError, explained, raw_body, typed

AnyRequest = Request[Any, Any, Any]
T = TypeVar("T", bound=Struct)
BODY_SECONDS = 120.0
MOST_REWARDS = 16_384
"""Of a group. They take most of a second, in which the server does nothing else."""
METADATA_BYTES = 65_536
"""Of a checkpoint's metadata: every status shows it again."""

Id = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
"""JavaScript's whole numbers, and well within the inbox's 64 bits."""
Label = Annotated[str, Meta(min_length=1, max_length=256)]


class Gpus(Struct):
    num_training_gpus: Annotated[int, Meta(ge=1)] | None = None


class GpuConfig(Struct):
    """Where a job trains. The engines' devices are the server's affair."""

    multi: Gpus | None = None
    single: dict[str, Any] | None = None


class InitializeRequest(Struct, kw_only=True):
    """Start to learn. The configuration is in `trainer_config`, or beside `model`; see docs/grpo.md for its keys."""

    model: str
    run_name: str | None = None
    suffix: str | None = None
    trainer_config: dict[str, Any] | None = None
    inference_config: dict[str, Any] | None = None
    gpu_config: GpuConfig | None = None


class JobRequest(Struct, kw_only=True):
    """Which job; None: the newest."""

    job_id: str | None = None


class StatusRequest(JobRequest, kw_only=True):
    """`wait`: do not answer before a batch id is offered that is not among `known`, or the job's state changes, for so
    many seconds. Saves asking again and again."""

    wait: Annotated[float, Meta(ge=0, le=60)] = 0.0
    known: Annotated[list[int], Meta(max_length=65_536)] = []


class CheckpointRequest(JobRequest, kw_only=True):
    """`metadata`: whatever the client wants to find again, up to 64 KiB of JSON, nested up to 64 deep."""

    checkpoint_name: str
    metadata: dict[str, Any] | None = None

    def checked(self) -> dict[str, Any]:
        """The metadata.

        Raises:
            ApiError: it is too much.
        """
        try:
            size = len(msgspec.json.encode(self.metadata))
        except RecursionError:
            return self.metadata or {}  # which the server refuses as too deep, like all that is deeper than it may be
        if size > METADATA_BYTES:
            message = f"Invalid 'metadata': expected at most {METADATA_BYTES} bytes of JSON, got {size}."
            raise ApiError(400, message, "invalid_value", "metadata")
        return self.metadata or {}


class Item(Struct, kw_only=True):
    """One completion of a group. `completion` is a message, or its text; `tools` those of its request (formerly
    `functions`)."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    completion: dict[str, Any] | str
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None
    reward: Any = UNSET
    advantage: Any = UNSET


class StepRequest(JobRequest, kw_only=True):
    """A group: a list of items, or of trajectories that are lists of items."""

    batch: list[Item | list[Item]]
    batch_id: Id | None = None
    model: str | None = None
    metrics: dict[str, Any] | None = None


class Reward(Struct, kw_only=True):
    """What one choice of a chat completion was worth."""

    completion_id: Annotated[str, Meta(min_length=1, max_length=256)]
    index: Annotated[int, Meta(ge=0, le=65_535)] = 0
    reward: Any = UNSET
    advantage: Any = UNSET
    trajectory: Label | Id | None = None


class RewardsRequest(JobRequest, kw_only=True):
    """A group of completions by their ids. `group` is the client's name for it: a repeated request changes nothing."""

    rewards: Annotated[list[Reward], Meta(max_length=MOST_REWARDS)]
    group: Label | None = None
    batch_id: Id | None = None
    metrics: dict[str, Any] | None = None


class LaunchRequest(Struct):
    model: str


class KillRequest(Struct):
    job_id: str | None = None


async def read(request: AnyRequest, type_: type[T]) -> T:
    """A JSON body as a struct; an empty one as a struct without values.

    Raises:
        ApiError: it is not a JSON object. 408: it did not come within `BODY_SECONDS`.
        ConfigError: a value is missing or of the wrong type; the path says which.
    """
    raw = await raw_body(request, BODY_SECONDS, "") or b"{}"
    try:
        return msgspec.json.decode(raw, type=type_)
    except msgspec.ValidationError as error:
        decoded(raw)  # an array or null: says that an object is expected
        raise explained(str(error), type_, "") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return typed(decoded(raw), type_, "")


def decoded(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: `invalid_rollout`: it holds NaN or Infinity, which are no numbers of JSON's; `invalid_json`.
    """
    reason = "it must be an object"
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason, value = "it is nested too deeply" if isinstance(error, RecursionError) else str(error), None
        if holds_nan(raw):
            message = "NaN and Infinity are not numbers of JSON's: every reward, advantage and metric must be finite."
            raise ApiError(400, message, "invalid_rollout") from None
    if not isinstance(value, dict):
        message = f"We could not parse the JSON body of your request: {reason}. The body must be one JSON object."
        raise ApiError(400, message, "invalid_json")
    return value


def holds_nan(raw: bytes) -> bool:
    """Whether a body would be JSON, were it not for NaN or Infinity (which Python's json writes)."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return any(word in raw for word in (b"NaN", b"Infinity"))
