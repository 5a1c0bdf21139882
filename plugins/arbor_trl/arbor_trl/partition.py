"""How rows are cut into micro-batches: the one partitioner of all trainers here.

Rows are put in an order in which neighbours are alike, and cut where that leaves the least padding, by dynamic
programming. Suffixes of array names: R, the rows; K, the numbers of micro-batches considered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .budget import Budget

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sizes:
    """What decides how R rows are cut. A row is a prompt, which other rows may have too, and tokens of its own."""

    prompt_R: Ints
    """Which of the distinct prompts."""
    prompt_tokens_R: Ints
    own_tokens_R: Ints

    @classmethod
    def of_sequences(cls, lengths: Sequence[int], numbers: Sequence[int]) -> Sizes:
        """Rows without a prompt: their lengths in tokens, and the numbers by which rows of one length are ordered."""
        return cls(np.array(numbers, np.int64), np.zeros(len(lengths), np.int64), np.array(lengths, np.int64))

    def __len__(self) -> int:
        return len(self.prompt_R)

    def take(self, rows: Sequence[int] | Ints) -> Sizes:
        """Those of some rows, in that order."""
        index = np.asarray(rows, dtype=np.int64)
        return Sizes(self.prompt_R[index], self.prompt_tokens_R[index], self.own_tokens_R[index])

    def padded_tokens(self, *, shared: bool) -> int:
        """Tokens of all rows as one micro-batch, padding included.

        Args:
            shared: Each distinct prompt is computed once.
        """
        prompts = len(set(self.prompt_R.tolist())) if shared else len(self)
        return int(prompts * self.prompt_tokens_R.max() + len(self) * self.own_tokens_R.max())

    def by_length(self) -> Ints:
        """The rows' numbers, shortest first."""
        return np.lexsort((self.prompt_R, self.own_tokens_R, self.prompt_tokens_R + self.own_tokens_R))

    def by_prompt(self) -> Ints:
        """The rows' numbers, those of one prompt together."""
        longest = np.zeros(self.prompt_R.max() + 1, dtype=np.int64)
        np.maximum.at(longest, self.prompt_R, self.own_tokens_R)
        return np.lexsort((self.own_tokens_R, self.prompt_R, longest[self.prompt_R]))


def cut(sizes: Sizes, budget: Budget, most_rows: int | None, *, shared: bool, share: float = 1.0) -> list[list[int]]:
    """Cut rows into as many micro-batches as cost least in all: padded tokens, and `budget.overhead` for each.

    A micro-batch keeps within the budget's tokens and `most_rows`, unless it is one row.

    Args:
        shared: Each distinct prompt of a micro-batch is computed once.
        share: How large the largest micro-batch may be, in parts of what it would be.
    """
    parts = _cheapest(sizes, budget, most_rows, shared=shared)
    if share == 1.0:
        return parts
    largest = max(sizes.take(rows).padded_tokens(shared=shared) for rows in parts)
    return _cheapest(sizes, replace(budget, tokens=int(share * largest)), most_rows, shared=shared)


def cut_into(sizes: Sizes, count: int) -> list[list[int]]:
    """Cut rows into `count` micro-batches with the fewest padded tokens; there are at least as many rows.

    Fewest among all cuts of the rows in order of length.
    """
    order = sizes.by_length()
    return _parts(order, _best_edges(_tokens(sizes.take(order), shared=False), len(order), count)[1])


def _cheapest(sizes: Sizes, budget: Budget, most_rows: int | None, *, shared: bool) -> list[list[int]]:
    """By length, or by prompt where prompts are shared: whichever costs less."""
    orders = [sizes.by_length(), sizes.by_prompt()] if shared else [sizes.by_length()]
    cuts = []
    for order in orders:
        costs = _costs(sizes.take(order), budget, most_rows, shared=shared)
        cuts.append((*_best_edges(costs, len(order), None), order))
    _, edges, order = min(cuts, key=lambda found: found[0])
    return _parts(order, edges)


def _parts(order: Ints, edges: list[int]) -> list[list[int]]:
    return [[int(row) for row in order[start:end]] for start, end in pairwise(edges)]


def _tokens(sizes: Sizes, *, shared: bool) -> Iterator[NDArray[np.float64]]:
    """For each last row of a micro-batch, its padded tokens by its first row, from 0 to the last."""
    prompts_R, prompt_tokens_R, own_tokens_R = (np.zeros(len(sizes), dtype=np.int64) for _ in range(3))
    seen: dict[int, int] = {}
    for last in range(len(sizes)):
        prompt, end = int(sizes.prompt_R[last]), last + 1
        prompts_R[seen.get(prompt, -1) + 1 : end] += 1  # distinct ones, of the rows from each first one on
        seen[prompt] = last
        np.maximum(prompt_tokens_R[:end], sizes.prompt_tokens_R[last], out=prompt_tokens_R[:end])
        np.maximum(own_tokens_R[:end], sizes.own_tokens_R[last], out=own_tokens_R[:end])
        rows = np.arange(end, 0, -1)
        computed = prompts_R[:end] if shared else rows
        yield (computed * prompt_tokens_R[:end] + rows * own_tokens_R[:end]).astype(np.float64)


def _costs(sizes: Sizes, budget: Budget, most_rows: int | None, *, shared: bool) -> Iterator[NDArray[np.float64]]:
    """The same as costs; infinite where a micro-batch would be too large."""
    for tokens in _tokens(sizes, shared=shared):
        rows = np.arange(len(tokens), 0, -1)
        fits = (tokens <= budget.tokens) & (rows <= (most_rows or len(sizes))) | (rows == 1)
        yield np.where(fits, tokens + budget.overhead, np.inf)


def _best_edges(columns: Iterator[NDArray[np.float64]], rows: int, count: int | None) -> tuple[float, list[int]]:
    """The contiguous partition that costs least: its cost, and where its parts begin and end.

    Args:
        columns: For each last row, the costs of a part by its first row.
        count: Parts; None: any number.
    """
    # best_KR[k, r]: the least cost of the first r rows as k parts; where the number is free, k is 0 and means any
    best_KR = np.full((1 if count is None else count + 1, rows + 1), np.inf)
    best_KR[0, 0] = 0
    before_KR, after_KR = (best_KR, best_KR) if count is None else (best_KR[:-1], best_KR[1:])
    first_KR = np.zeros((len(after_KR), rows + 1), dtype=np.int64)
    for last, costs in enumerate(columns):
        options = before_KR[:, : last + 1] + costs
        first_KR[:, last + 1] = options.argmin(axis=1)
        after_KR[:, last + 1] = options.min(axis=1)
    edges = [rows]
    while edges[-1] > 0:
        edges.append(int(first_KR[-1 if count is None else count - len(edges), edges[-1]]))
    return float(best_KR[-1, rows]), edges[::-1]
