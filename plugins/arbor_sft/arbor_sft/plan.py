"""Which rows form each optimizer step, and how a step is cut into micro-batches.

The plan is a pure function of lengths, seed and sizes, known before training: a resumed run finds its place by
counting, and how a step is cut changes its time but not its gradient, which is the mean over the tokens of the whole
step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from arbor_trl.budget import Budget
from arbor_trl.partition import Sizes, cut_into

from . import SftConfig

Rows = list[int]
Layout = Literal["padded", "sorted", "packed"]

MOST_PARTS = 16
SAMPLED_STEPS = 32

EPOCHS = 3
FEWEST_SEEN, MOST_SEEN = 100, 25_000
"""Rows seen over all epochs: fewer teach little, more are seldom needed."""
BATCH_SHARE = 0.002


def n_epochs(config: SftConfig, rows: int) -> int:
    """Passes over the data; `auto` as OpenAI's cookbook estimates them: 3, bounded by the rows seen in all."""
    if config.n_epochs != "auto":
        return config.n_epochs
    if rows * EPOCHS < FEWEST_SEEN:
        return min(25, -(-FEWEST_SEEN // rows))
    return max(1, min(EPOCHS, MOST_SEEN // rows))


def batch_size(config: SftConfig, rows: int) -> int:
    """Rows per optimizer step; `auto`: 0.2 % of the rows, 1 to 256."""
    if config.batch_size != "auto":
        return config.batch_size
    return max(1, min(256, round(rows * BATCH_SHARE)))


@dataclass(frozen=True)
class Plan:
    """All optimizer steps of a job."""

    steps: list[list[Rows]]
    """Of each step, its micro-batches; each step has the same number of them, some may be empty."""
    epoch_ends: frozenset[int]
    """The steps (from 1) after which every row was seen once more."""
    parts: int
    """Micro-batches per step."""
    tokens: int
    """Tokens of all steps, without padding."""

    def tokens_of(self, steps: int, lengths: Sequence[int]) -> int:
        """Tokens of the first steps, without padding."""
        return sum(lengths[row] for step in self.steps[:steps] for rows in step for row in rows)

    @property
    def micro_batches(self) -> list[Rows]:
        return [rows for step in self.steps for rows in step]


def make(
    lengths: Sequence[int],
    *,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    seed: int,
    layout: Layout,
    micro_batch_size: int | None,
    budget: Budget,
    ranks: int = 1,
    share: float = 1.0,
) -> Plan:
    """Shuffle the rows of each epoch, cut them into steps of `batch_size` rows (an epoch's last may be smaller), and
    each step into micro-batches.

    Args:
        lengths: Tokens of each row.
        micro_batch_size: Most rows of a micro-batch; None: chosen by `best_parts`.
        ranks: Processes that share each step; the number of micro-batches is a multiple of it.
        share: How large micro-batches may be, in parts of what they would be.
    """
    batches: list[Rows] = []
    ends = set()
    for epoch in range(epochs):
        order = list(range(len(lengths)))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        batches += [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        ends.add(len(batches))
    batches = batches[:max_steps]
    if micro_batch_size is None:
        parts = best_parts(lengths, batches[:SAMPLED_STEPS], layout, budget, ranks)
        if share < 1:
            parts = finer(lengths, batches, layout, budget, ranks, parts, share)
    else:
        most = max(1, int(micro_batch_size * share))
        parts = _multiple(-(-min(batch_size, len(lengths)) // most), ranks)
    even = micro_batch_size is not None
    return Plan(
        steps=[cut(rows, lengths, parts, layout, even=even) for rows in batches],
        epoch_ends=frozenset(end for end in ends if end <= len(batches)),
        parts=parts,
        tokens=sum(lengths[row] for rows in batches for row in rows),
    )


def best_parts(lengths: Sequence[int], batches: Sequence[Rows], layout: Layout, budget: Budget, ranks: int) -> int:
    """The number of micro-batches per step that costs least, among those that keep within the budget's tokens.

    The cost of a step is its padded tokens and `budget.overhead` for each micro-batch. Where no number keeps within the
    budget, single rows do best.
    """
    rows = max(map(len, batches))
    costs = {}
    for parts in sorted({_multiple(n, ranks) for n in (*range(1, MOST_PARTS + 1), rows // 2, rows) if 0 < n <= rows}):
        sizes = [[size(part, lengths, layout) for part in cut(batch, lengths, parts, layout)] for batch in batches]
        if max(map(max, sizes)) <= budget.tokens:
            costs[parts] = sum(map(sum, sizes)) + budget.overhead * parts * len(batches)
    return min(costs, key=costs.__getitem__) if costs else _multiple(rows, ranks)


def finer(
    lengths: Sequence[int],
    batches: Sequence[Rows],
    layout: Layout,
    budget: Budget,
    ranks: int,
    parts: int,
    share: float,
) -> int:
    """The number of micro-batches per step that costs least, among those with which the largest micro-batch has at most
    `share` of the tokens that it has with `parts`."""

    def largest(batch: Rows) -> int:
        return max(size(part, lengths, layout) for part in cut(batch, lengths, parts, layout))

    worst = sorted(batches, key=largest, reverse=True)[:SAMPLED_STEPS]
    limit = int(share * largest(worst[0]))
    return best_parts(lengths, worst, layout, replace(budget, tokens=limit), ranks)


def cut(rows: Rows, lengths: Sequence[int], parts: int, layout: Layout, *, even: bool = False) -> list[Rows]:
    """Cut a step's rows into `parts` micro-batches, the last of them empty where there are fewer rows."""
    if layout == "padded":
        pieces = _chunks(rows, parts)
    else:
        sizes = Sizes.of_sequences([lengths[row] for row in rows], rows)
        if even:
            pieces = _chunks([rows[at] for at in sizes.by_length()], parts)
        else:
            pieces = [[rows[at] for at in part] for part in cut_into(sizes, min(parts, len(rows)))]
    return pieces + [[] for _ in range(parts - len(pieces))]


def size(rows: Rows, lengths: Sequence[int], layout: Layout) -> int:
    """Tokens of a micro-batch, padding included."""
    found = [lengths[row] for row in rows] or [0]
    return sum(found) if layout == "packed" else max(found) * len(found)


def _chunks(rows: Rows, parts: int) -> list[Rows]:
    each = -(-len(rows) // parts)
    return [rows[at : at + each] for at in range(0, len(rows), each)]


def _multiple(parts: int, ranks: int) -> int:
    return -(-parts // ranks) * ranks


def evaluation(lengths: Sequence[int], layout: Layout, most_rows: int, budget: Budget) -> list[Rows]:
    """Every row once, in micro-batches of like length within the budget."""
    found: list[Rows] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if found and len(found[-1]) < most_rows and size([*found[-1], row], lengths, layout) <= budget.tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found
