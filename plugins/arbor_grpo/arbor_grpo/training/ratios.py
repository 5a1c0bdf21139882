"""Weights for what the sampler and the trainer disagree on (`importance_sampling_mode`), as TRL has them."""

from __future__ import annotations

import torch
from torch import Tensor

from arbor_grpo import GrpoConfig

from .micro_batches import Batch


def correction(batch: Batch, config: GrpoConfig) -> Tensor:
    """How much likelier the trainer takes what was sampled to be than its sampler did: B x C, or B x 1 for sequences.
    Tokens whose sampler is not known weigh 1."""
    mode = str(config.importance_sampling_mode)
    old, mask = batch["old_per_token_logps"], batch["completion_mask"] * batch["tool_mask"]
    sampling = batch.get("sampling_per_token_logps", old)
    difference = torch.nan_to_num((old - sampling) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=low, max=high)
    outside = (ratio < (low or 0.0)) | (ratio > (high or float("inf")))
    return ratio.masked_fill(outside, 0.0)
