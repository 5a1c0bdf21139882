"""What Arbor's trainers on TRL share. This module imports no torch: plugins take the types of their configuration here.

The functions beside it take a `Run` whose configuration has the keys `lora`, `dtype`, `attention` and
`gradient_checkpointing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from arbor_core import TrainedWeights, Trainer

Auto = Literal["auto"]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]

COMMON_MODELS = ("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2")
"""Modules of common architectures, for warm workers."""


class LoraSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Train a low-rank adapter instead of all weights (LoRA, Hu et al. 2021, through PEFT)."""

    r: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Positive
    dropout: Share
    target_modules: str | list[str]


def trained_weights(config: Mapping[str, Any]) -> TrainedWeights:
    """What a configuration trains: a LoRA adapter of modules by name or by a pattern, which tells no names, or all
    weights."""
    lora = config["lora"]
    modules = lora["target_modules"] if lora else ()
    return TrainedWeights(
        adapter="lora" if lora else None,
        modules=() if isinstance(modules, str) else tuple(modules),
        keys={"adapter": "lora", "modules": "lora.target_modules"},
    )


def trl_trainer(config: type[Struct], entry: str, **more: Any) -> Trainer:
    """A trainer on TRL, whose configuration has the key `lora`.

    Args:
        more: Further arguments of `Trainer`.
    """
    preload = (entry.partition(":")[0], *COMMON_MODELS)
    if more.get("input", "file") == "file":
        more = {"model_check": "arbor_trl.row_check:row_check", **more}
    return Trainer(config, entry, preload=preload, prove="arbor_trl.job:prove", adapter=trained_weights, **more)
