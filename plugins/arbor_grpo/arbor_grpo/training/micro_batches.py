"""A step's rows as tensors, and how they are cut into micro-batches.

The loss of a micro-batch is weighted so that the sum over them is the loss of the whole step, whatever the cut: by its
share of the rows where a loss is a mean over sequences, by its share of the tokens where it is a mean over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from arbor_trl.budget import Budget
from numpy.typing import NDArray
from torch import Tensor

from .rows import Row

Batch = dict[str, Tensor]
PROMPT_KEYS = ("prompt_ids", "prompt_mask")
"""B x P, padded on the left."""
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
"""B x C, padded on the right; a ratio of sequences is B x 1."""
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
    prompts, completions = np.full((count, longest[0]), pad), np.full((count, longest[1]), pad)
    prompt_mask, completion_mask = np.zeros_like(prompts), np.zeros_like(completions)
    learned = np.zeros_like(completions)
    sampling = np.zeros((count, longest[1]), dtype=np.float32)
    for i, row in enumerate(rows):
        p, c = longest[0] - len(row.prompt), len(row.completion)
        prompts[i, p:], prompt_mask[i, p:] = row.prompt, 1
        completions[i, :c], completion_mask[i, :c], learned[i, :c] = row.completion, 1, row.mask
        sampling[i, :c] = np.nan if row.logprobs is None else row.logprobs
    made = {
        "prompt_ids": torch.from_numpy(prompts),
        "prompt_mask": torch.from_numpy(prompt_mask),
        "completion_ids": torch.from_numpy(completions),
        "completion_mask": torch.from_numpy(completion_mask),
        "tool_mask": torch.from_numpy(learned),
        "advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        "num_items_in_batch": torch.tensor(float(learned.sum())),
    }
    if any(row.logprobs is not None for row in rows):
        made["sampling_per_token_logps"] = torch.from_numpy(sampling)
    return {key: value.to(device) for key, value in made.items()}


def part(batch: Batch, rows: Sequence[int | None]) -> Batch:
    """The batch's rows with these numbers, without the padding that they do not need. None stands for a row without
    loss: all ranks run as many rows, though one may have fewer."""
    index = torch.tensor([row or 0 for row in rows], device=batch["advantages"].device)
    first = int(batch["prompt_mask"][index].sum(1).max())
    length = max(1, int(batch["completion_mask"][index].sum(1).max()))
    made = {}
    for key, value in batch.items():
        if value.dim() == 0:
            made[key] = value
        elif key in PROMPT_KEYS:
            made[key] = value[index, value.size(1) - first :]
        else:
            made[key] = value[index, :length] if key in COMPLETION_KEYS else value[index]
    for place, row in enumerate(rows):
        if row is None:
            made["tool_mask"][place] = 0
    return made


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
        return ranks * float((micro["completion_mask"] * micro["tool_mask"]).sum()) / max(1, tokens)
    return ranks * len(micro["advantages"]) / rows


def share(rows: Sequence[int | None], running: int, ranks: int) -> float:
    """A micro-batch's share of the rows that run through the model: what a loss that is a mean over them counts."""
    return ranks * sum(row is not None for row in rows) / max(1, running)


@dataclass(frozen=True)
class Sizes:
    """What decides how rows are cut: of each row its prompt (which of the distinct ones), and the lengths."""

    prompt: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    completion_tokens: NDArray[np.int64]

    def of(self, order: NDArray[np.int64]) -> Sizes:
        return Sizes(self.prompt[order], self.prompt_tokens[order], self.completion_tokens[order])


def sizes(rows: Sequence[Row]) -> Sizes:
    numbers: dict[bytes, int] = {}
    return Sizes(
        np.array([numbers.setdefault(row.prompt.tobytes(), len(numbers)) for row in rows], dtype=np.int64),
        np.array([len(row.prompt) for row in rows], dtype=np.int64),
        np.array([len(row.completion) for row in rows], dtype=np.int64),
    )


def cut(found: Sizes, budget: Budget, most_rows: int | None, *, shared: bool, share: float = 1.0) -> list[list[int]]:
    """Cut rows into micro-batches that cost least; none has more than `share` of the tokens that the largest would have
    (or it is one row)."""
    parts = cheapest(found, budget, most_rows, shared=shared)
    if share == 1.0:
        return parts
    largest = max(tokens_of(found.of(np.array(rows)), shared=shared) for rows in parts)
    return cheapest(found, replace(budget, tokens=int(share * largest)), most_rows, shared=shared)


def tokens_of(found: Sizes, *, shared: bool) -> int:
    """Tokens of a micro-batch, padding included."""
    computed = len(set(found.prompt.tolist())) if shared else len(found.prompt)
    return int(computed * found.prompt_tokens.max() + len(found.prompt) * (found.completion_tokens.max() + 1))


def cheapest(found: Sizes, budget: Budget, most_rows: int | None, *, shared: bool) -> list[list[int]]:
    """Cut rows into micro-batches with as few padded tokens as may be, by length, or by prompt where prompts are
    computed once for all their rows: whichever costs less."""
    by_length = np.lexsort((found.prompt, found.completion_tokens, found.prompt_tokens + found.completion_tokens))
    orders = [by_length]
    if shared:
        longest = np.zeros(found.prompt.max() + 1, dtype=np.int64)
        np.maximum.at(longest, found.prompt, found.completion_tokens)
        orders.append(np.lexsort((found.completion_tokens, found.prompt, longest[found.prompt])))
    cuts = [(*best_cut(found.of(order), budget, most_rows, shared=shared), order) for order in orders]
    _, edges, order = min(cuts, key=lambda cut: cut[0])
    return [[int(row) for row in order[a:b]] for a, b in zip([0, *edges], edges, strict=False)]


def best_cut(found: Sizes, budget: Budget, most_rows: int | None, *, shared: bool) -> tuple[float, list[int]]:
    """The contiguous partition that costs least, by dynamic programming, and its cost: padded tokens, and
    `budget.overhead` for each part. A part keeps within the budget's tokens unless it is one row."""
    count = len(found.prompt)
    starts = np.arange(count)
    prompts, prompt_tokens, completion_tokens = (np.zeros(count, dtype=np.int64) for _ in range(3))
    last: dict[int, int] = {}
    best, came = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for end in range(count):
        # of the rows from each start to this end: distinct prompts, longest prompt, longest completion
        prompts[last.get(int(found.prompt[end]), -1) + 1 : end + 1] += 1
        last[int(found.prompt[end])] = end
        np.maximum(prompt_tokens[: end + 1], found.prompt_tokens[end], out=prompt_tokens[: end + 1])
        np.maximum(completion_tokens[: end + 1], found.completion_tokens[end], out=completion_tokens[: end + 1])
        rows = end + 1 - starts[: end + 1]
        computed = prompts[: end + 1] if shared else rows
        tokens = computed * prompt_tokens[: end + 1] + rows * (completion_tokens[: end + 1] + 1)
        fits = (tokens <= budget.tokens) & (rows <= (most_rows or count)) | (rows == 1)
        costs = best[: end + 1] + np.where(fits, tokens + budget.overhead, np.inf)
        came[end + 1] = int(costs.argmin())
        best[end + 1] = costs[came[end + 1]]
    edges = [count]
    while came[edges[-1]] > 0:
        edges.append(int(came[edges[-1]]))
    return float(best[count]), edges[::-1]


def dealt(learned: Sequence[int], found: Sizes, ranks: int) -> list[list[int | None]]:
    """Rows dealt to ranks by length, so that the k-th rows of all ranks are of like length."""
    total = found.prompt_tokens + found.completion_tokens
    ordered = sorted(learned, key=lambda row: (int(total[row]), row))
    filled = [*ordered, *[None] * (-len(ordered) % ranks)]
    return [filled[rank::ranks] for rank in range(ranks)]
