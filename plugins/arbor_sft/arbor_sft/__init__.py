"""Supervised fine-tuning: names and types only. The server imports this; `train` is imported by workers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from arbor_trl import (
    FORMER_VALUES,
    Attention,
    Auto,
    Count,
    Dtype,
    LoraSettings,
    Positive,
    Probes,
    Seconds,
    Share,
    TrainingVersion,
    trl_trainer,
)
from msgspec import Meta, Struct

from arbor_core import Trainer, hookimpl


class SftConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`conf/trainer/sft.yaml`, typed. What a key means is said there."""

    n_epochs: Annotated[int, Meta(ge=1, le=50)] | Auto
    batch_size: Annotated[int, Meta(ge=1, le=256)] | Auto
    learning_rate_multiplier: Positive | Auto
    learning_rate: Positive | Auto
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_ratio: Share
    weight_decay: Annotated[float, Meta(ge=0)]
    max_grad_norm: Annotated[float, Meta(ge=0)]
    max_steps: Count | None
    lora: LoraSettings | None
    max_length: Annotated[int, Meta(ge=2)] | None
    too_long: Literal["truncate", "skip"]
    batching: Literal["auto", "padded", "sorted", "packed"]
    micro_batch_size: Count | Auto
    gradient_checkpointing: bool
    dtype: Dtype
    attention: Attention
    eval_steps: Count | None
    early_stopping_patience: Count | None
    checkpoint_steps: Count | None
    keep_checkpoints: Count | None
    probes: Probes
    resume_seconds: Seconds | None
    training_version: TrainingVersion

    former_values: ClassVar[Mapping[str, Any]] = {**FORMER_VALUES, "early_stopping_patience": None}


@hookimpl
def arbor_trainers() -> Mapping[str, Trainer]:
    """`sft`, which answers to OpenAI's method `supervised`."""
    return {"sft": trl_trainer(SftConfig, "arbor_sft.train:train", methods=("supervised",))}


@hookimpl
def arbor_tiny_models() -> Mapping[str, str]:
    """A Llama of a million random weights that reads bytes."""
    return {"tiny": "arbor_sft.tiny:make"}
