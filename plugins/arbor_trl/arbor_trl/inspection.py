"""Which modules of a model an adapter changes, found out without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from msgspec.structs import replace
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from arbor_core import TrainedWeights

from . import LoraSettings, trained_weights
from .job import lora_errors
from .model import adapter
from .vocabulary import readable

KINDS = {"linear": (nn.Linear, Conv1D), "embedding": (nn.Embedding,), "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def inspect(config: Mapping[str, Any], model: str) -> TrainedWeights | None:
    """What a job trains of a base model.

    Args:
        config: The job's.
        model: Directory or hub id.

    Returns:
        None: the model's architecture is not known here; the job says why when it loads it.

    Raises:
        JobFailed: `invalid_hyperparameters`: it has no such modules, or PEFT cannot change them.
    """
    trained = trained_weights(config)
    if trained.adapter is None:
        return trained
    settings = msgspec.convert(config["lora"], LoraSettings)
    try:
        with torch.device("meta"):
            described = readable(AutoConfig.from_pretrained(model, trust_remote_code=False))
            empty = AutoModelForCausalLM.from_config(described, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception:  # transformers and the hub raise many kinds
        return None
    with lora_errors(settings):
        adapted = get_peft_model(empty, adapter(settings), low_cpu_mem_usage=True)
    prefix = "base_model.model."
    changed = {
        name.removeprefix(prefix): kind(module.get_base_layer())
        for name, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    by_kind = {kind: name for name, kind in reversed(changed.items())}
    return replace(trained, modules=tuple(changed), kinds=by_kind)


def kind(module: nn.Module) -> str:
    """What a module is, in the words of `arbor_core.Servable`; the name of its class where there is none."""
    found = (word for word, classes in KINDS.items() if isinstance(module, classes))
    return next(found, type(module).__name__)
