"""What TRL measures of micro-batches as numbers of the whole step, and what is measured beside it.

Shape suffixes: B, rows; C, columns of completions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch
from accelerate import Accelerator
from torch import Tensor

from .micro_batches import Batch, learned_mask
from .rows import Row

OF_SEQUENCES = ("clip_ratio", "cispo_clip_ratio", "vespo")
"""TRL's metrics that are means over sequences where the ratio is one of sequences."""

OF_ROUTERS = "aux_loss"
"""TRL's metric of mixtures of experts: how unequally a micro-batch's tokens are spread over them."""

OF_EVENTS = ("step", "total_steps", "epoch", "fed", "digest", "num_tokens")
OF_STEPS = ("loss", "train_loss", "grad_norm", "learning_rate", "kl", "entropy", "cispo_clip_ratio", OF_ROUTERS)
OF_GROUPS = ("reward", "reward_std", "frac_reward_zero_std", "rows_cut", "groups_skipped", "groups_rejected")
OF_TIME = ("staleness_mean", "staleness_max", "wait_time", "train_time", "step_time", "publish_time", "publish_bytes")
OURS = frozenset((*OF_EVENTS, *OF_STEPS, *OF_GROUPS, *OF_TIME))
OUR_FOLDERS = ("client", "completions", "clip_ratio", "vespo", "sampling", "sampling_logp_difference")
"""What metrics of a step are called, alone or before a slash. A client's of such a name is put into `client/`, also in
steps and jobs that have none of their own: who reads it there knows who says so."""


class StepMetrics:
    """Collects over a step's micro-batches, and leaves one number of each metric.

    Args:
        found: TRL's own lists, to which each micro-batch appends one number.
        level: `importance_sampling_level`.
    """

    def __init__(self, found: dict[str, list[float]], level: str) -> None:
        self.found, self.by_rows = found, level == "sequence"
        self.before = {name: len(values) for name, values in found.items()}
        self.tokens: list[float] = []
        self.rows: list[float] = []
        self.differences: list[Tensor] = []

    def add(self, micro: Batch, logps_BC: Tensor | None) -> None:
        """A micro-batch has run; `logps_BC` are the policy's."""
        mask_BC = learned_mask(micro)
        self.tokens.append(float(mask_BC.sum()))
        self.rows.append(float(len(mask_BC)))
        sampling_BC = micro.get("sampling_per_token_logps")
        if sampling_BC is not None and logps_BC is not None:
            known_BC = mask_BC.bool() & ~sampling_BC.isnan()
            self.differences.append((logps_BC - sampling_BC)[known_BC].abs())

    def combine(self, accelerator: Accelerator) -> None:
        """Once for a step, on all ranks."""
        counts = torch.tensor([self.tokens, self.rows], device=accelerator.device)
        self.tokens, self.rows = accelerator.reduce(counts, "sum").tolist()
        for name, values in list(self.found.items()):
            start = self.before.get(name, 0)
            if not sum(self.tokens):  # nothing ran that has an entropy, or that could be clipped
                self.found[name] = values[:start]
            elif len(values) - start == len(self.tokens):
                values[start:] = [self.combine_values(name, values[start:])]
        nothing = torch.zeros(1, device=accelerator.device)  # changes neither number
        apart = torch.cat([*self.differences, nothing])
        known = torch.tensor(float(len(apart) - 1), device=accelerator.device)
        total, count = accelerator.reduce(torch.stack([apart.sum(), known]), "sum").tolist()
        highest = float(accelerator.gather(apart.max()).max())
        if count:
            self.found["sampling_logp_difference/mean"].append(total / count)
            self.found["sampling_logp_difference/max"].append(highest)

    def combine_values(self, name: str, values: Sequence[float]) -> float:
        real = [(v, t, r) for v, t, r in zip(values, self.tokens, self.rows, strict=True) if not math.isnan(v)]
        if not real:
            return math.nan
        if name.endswith("_min"):
            return min(value for value, _, _ in real)
        if name.endswith("_max"):
            return max(value for value, _, _ in real)
        by_rows = name == OF_ROUTERS or (self.by_rows and name.startswith(OF_SEQUENCES))
        weights = [rows if by_rows else tokens for _, tokens, rows in real]
        return sum(v * w for (v, _, _), w in zip(real, weights, strict=True)) / max(1.0, sum(weights))


def row_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Lengths are those of completions, in tokens that the policy sampled."""
    lengths = [row.sampled for row in rows]
    return {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(row.truncated for row in rows),
        "rows_cut": sum(row.cut for row in rows),
    }


def client_metrics(groups: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of what clients measured, by name; none of them is called as one of ours."""
    found = defaultdict(list)
    for group in groups:
        for name, value in group.items():
            ours = name in OURS or name.partition("/")[0] in OUR_FOLDERS
            found[f"client/{name}" if ours else name].append(value)
    return {name: fmean(values) for name, values in found.items() if all(map(math.isfinite, values))}
