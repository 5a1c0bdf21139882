"""How large micro-batches may get."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from arbor_core import Run

from .model import autocast, uses_cuda

FEWEST_TOKENS, MOST_TOKENS = 1024, 65_536
"""Bounds of a micro-batch's size where memory alone would not set them."""
CPU_OVERHEAD, CUDA_OVERHEAD = 128, 2_048
"""Tokens that could be trained in the time of one more micro-batch. Measured on two cores with a million weights: with
log-normal lengths and 16 rows a step, six to eight micro-batches are the fastest."""
CPU_SHARE, CUDA_SHARE = 0.125, 0.5
"""Of the memory there is, for activations. Not of what is free: a resumed run must choose the same."""
KEPT = 17
"""Numbers kept for the backward pass, per token, layer and hidden unit (Korthikanti et al. 2022, equation 1)."""

KEPT_OF_SHARED = 3
"""The same with gradient checkpointing, of prompts that several rows share: their keys and values too."""


@dataclass(frozen=True)
class Budget:
    """What a device can do with a micro-batch."""

    tokens: int
    """Most tokens, padding included, that a micro-batch should hold."""
    overhead: int
    """How many tokens could be trained in the time that one more micro-batch costs."""


def budget(run: Run[Any], model: PreTrainedModel) -> Budget:
    """How large the run's micro-batches may get."""
    config = model.config.get_text_config()
    kept = KEPT
    if run.config.gradient_checkpointing:
        kept = KEPT_OF_SHARED if getattr(run.config, "share_prompts", False) else 1
    per_token = config.num_hidden_layers * config.hidden_size * kept * (2 if autocast(run) else 4)
    if uses_cuda(run):
        memory, overhead = CUDA_SHARE * torch.cuda.get_device_properties(0).total_memory, CUDA_OVERHEAD
    else:
        memory, overhead = CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), CPU_OVERHEAD
    return Budget(min(MOST_TOKENS, max(FEWEST_TOKENS, int(memory / per_token))), overhead)
