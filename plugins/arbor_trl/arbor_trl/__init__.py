"""What Arbor's trainers on TRL share. This module imports no torch: plugins take the types of their configuration here.

The functions beside it take a `Run` whose configuration has the keys `lora`, `dtype`, `attention`,
`gradient_checkpointing`, `training_version`, `resume_seconds` and `probes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from arbor_core import TrainedWeights, Trainer

Auto = Literal["auto"]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
TrainingVersion = Literal[1, 2]
"""Rules of training, which a job keeps so that its steps come out again. The YAML of each method says the newest."""
Seconds = Annotated[float, Meta(ge=0)]
Probes = Annotated[list[Annotated[str, Meta(min_length=1, max_length=8_000)]], Meta(max_length=16)]
"""Prompts that named checkpoints answer."""
FORMER_VALUES: Mapping[str, Any] = {"training_version": 1, "resume_seconds": 60.0, "probes": []}
"""Keys that jobs of earlier versions have not, and how these trained."""

COMMON_MODELS = ("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2")
"""Modules of common architectures, for warm workers."""


class LoraSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Train a low-rank adapter instead of all weights (LoRA, Hu et al. 2021, through PEFT)."""

    r: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Positive
    dropout: Share
    target_modules: str | list[str]


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output."""
STORED_DTYPE = "float32"
"""In which trained weights are stored, whatever they are computed in: small updates would be lost in bfloat16."""


def trained_weights(config: Mapping[str, Any]) -> TrainedWeights:
    """What a configuration trains: a LoRA adapter of some modules, or all weights. Which modules of a model those are
    that it names, or that match its pattern, `arbor_trl.inspection` finds out."""
    lora = config["lora"]
    modules = lora["target_modules"] if lora else ()
    return TrainedWeights(
        adapter="lora" if lora else None,
        modules=() if isinstance(modules, str) else tuple(modules),
        kinds={"linear": ALL_LINEAR} if modules == ALL_LINEAR else {},
        dtype=STORED_DTYPE,
        keys={"adapter": "lora", "modules": "lora.target_modules"},
    )


def continued(adapter: Path, trained: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an adapter fixes of the configuration of a job that trains it further: all of `lora`.

    Args:
        adapter: Its directory.
        trained: The configuration of the job that has trained it. It may have the modules as a pattern, where the
            adapter has the names that were found.
    """
    path = adapter / "adapter_config.json"
    if not path.is_file():  # it was removed meanwhile, and the request will be refused for that
        return {}
    saved = msgspec.json.decode(path.read_bytes())
    pattern = (trained.get("lora") or {}).get("target_modules")
    modules = pattern if isinstance(pattern, str) else saved["target_modules"]
    found = {"r": saved["r"], "alpha": float(saved["lora_alpha"]), "dropout": float(saved["lora_dropout"])}
    return {"lora": {**found, "target_modules": sorted(modules) if isinstance(modules, list) else modules}}


def trl_trainer(config: type[Struct], entry: str, **more: Any) -> Trainer:
    """A trainer on TRL, whose configuration has the key `lora`, and which goes on from adapters (`begin`).

    Args:
        more: Further arguments of `Trainer`.
    """
    shared: dict[str, Any] = {
        "preload": (entry.partition(":")[0], *COMMON_MODELS),
        "prove": "arbor_trl.job:prove",
        "adapter": trained_weights,
        "adapters": True,
        "continued": continued,
        "inspect": "arbor_trl.inspection:inspect",
    }
    if more.get("input", "file") == "file":
        shared["model_check"] = "arbor_trl.row_check:row_check"
    return Trainer(config, entry, **{**shared, **more})
