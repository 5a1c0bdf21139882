"""A step's rows as tensors, cut into micro-batches, and what each of them counts.

The loss of a micro-batch is weighted so that the sum over them is the loss of the whole step, whatever the cut: by its
share of the rows where a loss is a mean over sequences, by its share of the tokens where it is a mean over tokens.

Shape suffixes: B, rows of a batch or a micro-batch; P, columns of prompts, padded on the left; C, columns of
completions, padded on the right. A batch's keys are TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from arbor_trl.partition import Sizes
from torch import Tensor

from arbor_grpo import GrpoConfig

from .rows import Row

Batch = dict[str, Tensor]
RowNumbers = list[int | None]
"""The rows of a micro-batch. None stands for a row without loss: all ranks run as many rows, though one may have
fewer."""

PROMPT_KEYS = ("prompt_ids", "prompt_mask")
"""B x P."""
COMPLETION_KEYS = (
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "entropy_mask",
)
"""B x C; a ratio of sequences is B x 1."""
BY_TOKENS, GLOBAL = ("bnpo",), ("dapo", "cispo", "vespo")
"""Losses that are a mean over the micro-batch's tokens, and those that divide by the step's already. All others are
means over rows."""


def tensors(rows: Sequence[Row], pad: int, device: torch.device) -> Batch:
    """TRL's ready batch of B rows: prompts of up to P tokens, completions of up to C; `advantages` is B.

    `sampling_per_token_logps` is NaN where it is not known, and absent where no row has it. `tool_mask` is 1 on tokens
    with a loss.
    """
    count = len(rows)
    longest = max(len(row.prompt) for row in rows), max(1, *(len(row.completion) for row in rows))
    prompt_BP, completion_BC = np.full((count, longest[0]), pad), np.full((count, longest[1]), pad)
    prompt_mask_BP, completion_mask_BC = np.zeros_like(prompt_BP), np.zeros_like(completion_BC)
    learned_BC = np.zeros_like(completion_BC)
    sampling_BC = np.zeros((count, longest[1]), dtype=np.float32)
    for i, row in enumerate(rows):
        p, c = longest[0] - len(row.prompt), len(row.completion)
        prompt_BP[i, p:], prompt_mask_BP[i, p:] = row.prompt, 1
        completion_BC[i, :c], completion_mask_BC[i, :c], learned_BC[i, :c] = row.completion, 1, row.mask
        sampling_BC[i, :c] = np.nan if row.logprobs is None else row.logprobs
    batch = {
        "prompt_ids": torch.from_numpy(prompt_BP),
        "prompt_mask": torch.from_numpy(prompt_mask_BP),
        "completion_ids": torch.from_numpy(completion_BC),
        "completion_mask": torch.from_numpy(completion_mask_BC),
        "tool_mask": torch.from_numpy(learned_BC),
        "advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        "num_items_in_batch": torch.tensor(float(learned_BC.sum())),
    }
    if any(row.logprobs is not None for row in rows):
        batch["sampling_per_token_logps"] = torch.from_numpy(sampling_BC)
    return {key: value.to(device) for key, value in batch.items()}


def learned_mask(batch: Batch) -> Tensor:
    """1 on tokens with a loss: B x C."""
    return batch["completion_mask"] * batch["tool_mask"]


def sequences(batch: Batch) -> tuple[Tensor, Tensor, int]:
    """Prompts and completions as one: ids and mask, B x (P + C), and C."""
    ids_BT = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask_BT = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids_BT, mask_BT, batch["completion_ids"].size(1)


def select(batch: Batch, rows: RowNumbers) -> Batch:
    """The batch's rows with these numbers, without the padding that they do not need."""
    index_B = torch.tensor([row or 0 for row in rows], device=batch["advantages"].device)
    prompt_columns = int(batch["prompt_mask"][index_B].sum(1).max())
    length = max(1, int(batch["completion_mask"][index_B].sum(1).max()))
    micro = {}
    for key, value in batch.items():
        if value.dim() == 0:
            micro[key] = value
        elif key in PROMPT_KEYS:
            micro[key] = value[index_B, value.size(1) - prompt_columns :]
        else:
            micro[key] = value[index_B, :length] if key in COMPLETION_KEYS else value[index_B]
    for place, row in enumerate(rows):
        if row is None:
            micro["tool_mask"][place] = 0
    return micro


def weight(loss_type: str, micro: Batch, rows: int, tokens: int, ranks: int) -> float:
    """What the loss of a micro-batch counts.

    Args:
        rows: Of the whole step, those without loss included.
        tokens: With loss, of the whole step.
        ranks: Gradients are averaged over them, so each counts as much.
    """
    if loss_type in GLOBAL:
        return 1.0
    if loss_type in BY_TOKENS:
        return ranks * float(learned_mask(micro).sum()) / max(1, tokens)
    return ranks * len(micro["advantages"]) / rows


def share_of_rows(rows: RowNumbers, running: int, ranks: int) -> float:
    """A micro-batch's share of the rows that run through the model: what a loss that is a mean over them counts."""
    return ranks * sum(row is not None for row in rows) / max(1, running)


def sampling_correction(batch: Batch, config: GrpoConfig) -> Tensor:
    """Weights for what the trainer and the sampler disagree on (`importance_sampling_mode`), as TRL has them: how much
    likelier the trainer takes what was sampled to be. B x C, or B x 1 for sequences. Tokens whose sampler is not known
    weigh 1."""
    mode = str(config.importance_sampling_mode)
    old_BC, mask_BC = batch["old_per_token_logps"], learned_mask(batch)
    sampling_BC = batch.get("sampling_per_token_logps", old_BC)
    difference = torch.nan_to_num((old_BC - sampling_BC) * mask_BC, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=low, max=high)
    outside = (ratio < (low or 0.0)) | (ratio > (high or float("inf")))
    return ratio.masked_fill(outside, 0.0)


# --- how rows are cut -------------------------------------------------------------------------------------------------


def sizes(rows: Sequence[Row]) -> Sizes:
    """A row's own tokens are its completion and the prompt's last token, which predicts the first of it."""
    numbers: dict[bytes, int] = {}
    return Sizes(
        np.array([numbers.setdefault(row.prompt.tobytes(), len(numbers)) for row in rows], dtype=np.int64),
        np.array([len(row.prompt) for row in rows], dtype=np.int64),
        np.array([len(row.completion) + 1 for row in rows], dtype=np.int64),
    )


def deal(learned: Sequence[int], found: Sizes, ranks: int) -> list[RowNumbers]:
    """Rows dealt to ranks by length, so that the k-th rows of all ranks are of like length."""
    total_R = found.prompt_tokens_R + found.own_tokens_R
    ordered = sorted(learned, key=lambda row: (int(total_R[row]), row))
    filled = [*ordered, *[None] * (-len(ordered) % ranks)]
    return [filled[rank::ranks] for rank in range(ranks)]


def longest_of(hands: Sequence[RowNumbers], found: Sizes) -> Sizes:
    """The k-th rows of all ranks as one row that is as long as the longest of them: they run at the same time."""
    units = [[row for row in unit if row is not None] for unit in zip(*hands, strict=True)]
    return Sizes(
        np.arange(len(units)),
        np.array([max(found.prompt_tokens_R[unit]) for unit in units]),
        np.array([max(found.own_tokens_R[unit]) for unit in units]),
    )
