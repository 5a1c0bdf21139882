"""A step's loss in plain torch: each row alone, nothing padded, cut or shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from arbor_grpo import GrpoConfig
from torch import Tensor

from arbor_core.types import Group, Rollout

CISPO_HIGH = 5.0


@dataclass(frozen=True)
class Row:
    """Of C completion tokens; all tensors are of C numbers."""

    logps: Tensor
    old: Tensor
    """What the ratio divides by."""
    sampling: Tensor
    mask: Tensor
    advantage: float

    def sum(self, numbers: Tensor) -> Tensor:
        return (numbers * self.mask).sum()

    def mean(self, numbers: Tensor) -> Tensor:
        return self.sum(numbers) / self.mask.sum().clamp(min=1)


def tokens(raw: bytes) -> Tensor:
    return torch.tensor(np.frombuffer(raw, dtype="<i4").tolist(), dtype=torch.long)


def token_logps(model: Any, prompt: Tensor, completion: Tensor, temperature: float) -> Tensor:
    """On the CPU, wherever the model is."""
    ids = torch.cat([prompt, completion])[None].to(model.device)
    logits = model(input_ids=ids).logits[0].float().cpu() / temperature
    found = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return found.gather(1, completion[:, None])[:, 0]


def reference(model: Any, base: Any, groups: Sequence[Group], config: GrpoConfig) -> Tensor:
    """The loss of a step of groups whose sampler is known; `base` is what `beta` holds the policy to."""
    sums, counts = [], []
    for group in groups:
        rewards = torch.tensor([said.reward for said in group.rollouts], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for said, advantage in zip(group.rollouts, advantages.tolist(), strict=True):
            row = scored(model, said, advantage, config)
            loss = token_losses(row, config)
            if config.beta and len(row.logps):
                loss = loss + config.beta * divergence(row, base, said, config)
            sums.append(row.sum(loss))
            counts.append(row.mask.sum())
    return step_loss(torch.stack(sums), torch.stack(counts), config)


def scored(model: Any, said: Rollout, advantage: float, config: GrpoConfig) -> Row:
    completion = tokens(said.completion)
    if not len(completion):
        return Row(*[torch.zeros(0)] * 4, advantage)
    logps = token_logps(model, tokens(said.prompt), completion, config.temperature)
    sampling = torch.frombuffer(bytearray(said.logprobs), dtype=torch.float32)
    old = sampling if config.ratio == "sampler" else logps.detach()
    mask = torch.tensor(list(said.mask) or [1] * len(completion), dtype=torch.float32)
    if said.truncated and config.mask_truncated_completions:
        mask = torch.zeros_like(mask)
    return Row(logps, old, sampling, mask, advantage)


def step_loss(sums: Tensor, counts: Tensor, config: GrpoConfig) -> Tensor:
    """A row without a token to learn counts among the rows."""
    if config.loss_type in ("grpo", "sapo"):
        return (sums / counts.clamp(min=1)).mean()
    if config.loss_type == "luspo":
        return sums.mean()
    if config.loss_type == "dr_grpo":
        return sums.sum() / (len(sums) * (config.max_completion_length or math.nan))
    return sums.sum() / counts.sum()


def ratios(row: Row, config: GrpoConfig) -> Tensor:
    apart = row.logps - row.old
    if config.importance_sampling_level == "sequence":
        apart = row.mean(apart).expand_as(apart)
    return torch.exp(apart)


def divergence(row: Row, base: Any, said: Rollout, config: GrpoConfig) -> Tensor:
    with torch.no_grad():
        fixed = token_logps(base, tokens(said.prompt), tokens(said.completion), config.temperature)
    apart = fixed - row.logps
    found = torch.exp(apart) - apart - 1
    return found * ratios(row, config) if config.use_bias_correction_kl else found


def token_losses(row: Row, config: GrpoConfig) -> Tensor:
    """Of one row, before it is averaged."""
    if not len(row.logps):
        return torch.zeros(0)
    limit = config.off_policy_mask_threshold
    if limit is not None and row.advantage < 0 and float(row.mean(row.sampling - row.logps.detach())) > limit:
        return torch.zeros_like(row.logps)
    if config.loss_type == "vespo":
        return -gamma(row, config) * row.advantage * row.logps
    return policy_losses(row, ratios(row, config), config) * correction(row, config)


def policy_losses(row: Row, ratio: Tensor, config: GrpoConfig) -> Tensor:
    high, advantage = config.epsilon_high, row.advantage
    if config.loss_type == "cispo":
        return -ratio.clamp(max=high or CISPO_HIGH).detach() * advantage * row.logps
    if config.loss_type == "sapo":
        t = config.sapo_temperature_pos if advantage > 0 else config.sapo_temperature_neg
        return -torch.sigmoid(t * (ratio - 1)) * 4 / t * advantage
    clipped = ratio.clamp(1 - config.epsilon, 1 + (high or config.epsilon))
    return -torch.min(ratio.clamp(max=config.delta or math.inf) * advantage, clipped * advantage)


def gamma(row: Row, config: GrpoConfig) -> Tensor:
    """vespo's weight of a sequence: w**k * exp(decay * (1 - w)) of its ratio w."""
    k, decay = config.vespo_k_pos, config.vespo_lambda_pos
    if row.advantage < 0:
        k, decay = config.vespo_k_neg, config.vespo_lambda_neg
    least = math.log(1e-8)
    whole = row.sum((row.logps - row.old).clamp(-20, 20)) + correction(row, config).log().clamp(least, 20).sum()
    whole = whole.detach().clamp(least, 20)
    return torch.exp(decay + k * whole - decay * whole.exp())


def correction(row: Row, config: GrpoConfig) -> Tensor:
    """How much likelier the trainer takes what was sampled to be than the sampler did, of each token or of all."""
    mode = config.importance_sampling_mode
    if mode is None:
        return torch.ones_like(row.mask)
    apart = (row.old - row.sampling) * row.mask
    weight = torch.exp(apart.sum().expand_as(apart) if mode.startswith("sequence") else apart)
    low = -math.inf if config.importance_sampling_clip_min is None else config.importance_sampling_clip_min
    high = math.inf if config.importance_sampling_clip_max is None else config.importance_sampling_clip_max
    if mode.endswith("truncate"):
        return weight.clamp(low, high)
    return torch.where((weight < low) | (weight > high), torch.zeros_like(weight), weight)
