"""Sequences that are generated side by side: how they enter, advance by a token, and leave.

`SlotBatch` admits and drops sequences at any step. `EvenBatch` is for models whose cache is not a row of keys and
values (state-space models, chunked attention): it takes sequences of equal length together and fills up only when it
is empty. `make_batch` tries the first on the loaded model and keeps what gives the model's own logits.

Shapes: B rows (of the batch, or of a prefill), N rows that are picked from them, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from .lora import Adapter, AdapterRows
from .slots import SlotForward, Slots, rounded


class Prefill(Protocol):
    """Prompts on their way into a batch."""

    def advance(self) -> bool:
        """Run the next chunk; True when the prompts are through."""
        ...


class Batch(Protocol):
    """Rows are numbered 0, 1, ...; `drop` says how that changes."""

    adapters: list[Adapter | None]
    """Of each row."""

    def fits(self, lengths: Sequence[int]) -> int:
        """How many sequences of these lengths (tokens), from the first on, could be admitted now."""
        ...

    def alike(self, first: int, other: int) -> bool:
        """Whether prompts of two lengths should be prefilled together."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]) -> Prefill:
        """Begin to run prompts that are `alike`."""
        ...

    def admit(self, done: Any, picks: Sequence[int]) -> Tensor:
        """Append one row per pick (an index into the prefill's prompts); their next logits [N, V]."""
        ...

    def overflow(self) -> int:
        """How many rows, from the last, must leave before `step` fits into the cache."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to every row; their next logits [B, V]."""
        ...

    def drop(self, rows: set[int]) -> list[int]:
        """Remove rows; the old number of every row that remains, in its new place."""
        ...

    def clear(self) -> None:
        """Forget all rows and give their memory back."""
        ...


class SlotPrefill:
    """Prompts running into slots of their own, aligned at their last tokens, a chunk at a time."""

    def __init__(
        self,
        forward: SlotForward,
        lora: AdapterRows,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Adapter | None],
        budget: int,
    ) -> None:
        self.forward, self.lora, self.adapters = forward, lora, list(adapters)
        self.lengths = [len(prompt) for prompt in prompts]
        self.longest, self.at = max(self.lengths), 0
        self.chunk = max(1, budget // len(prompts))
        device = forward.model.device
        padded = [[0] * (self.longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids_BT = torch.tensor(padded, device=device)
        shift_B1 = torch.tensor([self.longest - length for length in self.lengths], device=device)[:, None]
        self.positions_BT = torch.arange(self.longest, device=device) - shift_B1
        self.slots = Slots(len(prompts), rounded(self.longest + 1))
        self.logits_BV: Tensor

    def advance(self) -> bool:
        end = min(self.at + self.chunk, self.longest)
        positions_BT = self.positions_BT[:, self.at : end]
        # Padding sits before a prompt. It writes into the last column, which nobody sees, and looks at column 0, so
        # that its attention has something finite to look at.
        columns_BT = positions_BT.where(positions_BT >= 0, self.slots.capacity[1] - 1)
        with self.lora.of(self.adapters):
            ids_BT, width = self.ids_BT[:, self.at : end], self.slots.capacity[1]
            self.logits_BV = self.forward(ids_BT, positions_BT.clamp(min=0), columns_BT, self.slots, width)
        self.at = end
        return self.at == self.longest


class SlotBatch:
    """Sequences in slots.

    Args:
        forward: Calls the model.
        lora: Tells the model's layers whose adapter a row wants.
        max_rows: Rows at once.
        max_cells: Columns times rows at once.
        budget: Prompt tokens in one call of the model.
    """

    def __init__(self, forward: SlotForward, lora: AdapterRows, max_rows: int, max_cells: int, budget: int) -> None:
        self.forward, self.lora, self.budget = forward, lora, budget
        self.max_rows, self.max_cells = max_rows, max_cells
        self.lengths: list[int] = []
        self.adapters: list[Adapter | None] = []
        self.slots = Slots(0, 0)

    def fits(self, lengths: Sequence[int]) -> int:
        longest = max(self.lengths, default=0)
        for count, length in enumerate(lengths):
            rows, longest = len(self.lengths) + count + 1, max(longest, length)
            if rows > self.max_rows or rows * rounded(longest + 1) > self.max_cells:
                return count
        return len(lengths)

    def alike(self, first: int, other: int) -> bool:
        # At most a fifth of the padded tokens are padding, or so few that another call would cost more.
        return abs(first - other) <= max(first // 5, 16)

    def prefill(self, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]) -> SlotPrefill:
        return SlotPrefill(self.forward, self.lora, prompts, adapters, self.budget)

    def admit(self, done: SlotPrefill, picks: Sequence[int]) -> Tensor:
        lengths = [done.lengths[pick] for pick in picks]
        self._reserve(len(self.lengths) + len(picks), max([*self.lengths, *lengths]) + 1)
        for pick in picks:
            self.slots.take(done.slots, pick, len(self.lengths), done.lengths[pick])
            self.lengths.append(done.lengths[pick])
            self.adapters.append(done.adapters[pick])
        return done.logits_BV[list(picks)]

    def overflow(self) -> int:
        rows, columns = len(self.lengths), rounded(max(self.lengths, default=0) + 1)
        return max(0, rows - max(1, self.max_cells // columns))

    def step(self, tokens: Sequence[int]) -> Tensor:
        width = rounded(max(self.lengths) + 1)
        self._reserve(len(self.lengths), width)
        device = self.forward.model.device
        positions_B1 = torch.tensor(self.lengths, device=device)[:, None]
        with self.lora.of(self.adapters):
            ids_B1 = torch.tensor(tokens, device=device)[:, None]
            logits_BV = self.forward(ids_B1, positions_B1, positions_B1, self.slots, width)
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV

    def drop(self, rows: set[int]) -> list[int]:
        order = list(range(len(self.lengths)))
        for row in sorted(rows, reverse=True):
            last = order.pop()
            if row < len(order):
                self.slots.copy_row(len(order), row)
                order[row] = last
        self.lengths = [self.lengths[row] for row in order]
        self.adapters = [self.adapters[row] for row in order]
        if not order:
            self.clear()
        return order

    def clear(self) -> None:
        self.lengths, self.adapters, self.slots = [], [], Slots(0, 0)

    def _reserve(self, rows: int, columns: int) -> None:
        """Grow the slots if they are too small: rows by doubling, as far as the cells allow, columns as needed."""
        have_rows, have_columns = self.slots.capacity
        columns = rounded(columns)
        if rows <= have_rows and columns <= have_columns:
            return
        columns = max(columns, have_columns) if rows * have_columns <= self.max_cells else columns
        roomy = min(max(have_rows, 1 << (rows - 1).bit_length()), self.max_rows)
        self.slots.resize(roomy if roomy * columns <= self.max_cells else rows, columns)


class EvenPrefill:
    """Prompts of one length, in one call, with the model's own cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        lora: AdapterRows,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Adapter | None],
    ) -> None:
        self.model, self.lora, self.adapters = model, lora, list(adapters)
        self.ids_BT = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        self.cache = DynamicCache(config=model.config)
        self.logits_BV: Tensor

    def advance(self) -> bool:
        with self.lora.of(self.adapters):
            self.logits_BV = even_forward(self.model, self.ids_BT, self.cache, 0)
        return True


def even_forward(model: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache, past: int) -> Tensor:
    """Run tokens after `past` others on a model's own cache; the logits after each row's last one, [B, V]."""
    takes = signature(model.forward).parameters
    positions_BT = torch.arange(past, past + ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    extra: dict[str, Any] = {"position_ids": positions_BT} if "position_ids" in takes else {}
    extra["past_key_values" if "past_key_values" in takes else "cache_params"] = cache
    logits_BV: Tensor = model(input_ids=ids_BT, use_cache=True, **extra).logits[:, -1]
    return logits_BV


class EvenBatch:
    """Sequences that have the same length at every step. Arguments as for `SlotBatch`."""

    def __init__(self, model: PreTrainedModel, lora: AdapterRows, max_rows: int, max_cells: int) -> None:
        self.model, self.lora, self.max_rows, self.max_cells = model, lora, max_rows, max_cells
        self.adapters: list[Adapter | None] = []
        self.length = 0
        self.cache: DynamicCache | None = None

    def fits(self, lengths: Sequence[int]) -> int:
        if self.cache is not None or not lengths:
            return 0
        return min(len(lengths), self.max_rows, max(1, self.max_cells // (lengths[0] + 1)))

    def alike(self, first: int, other: int) -> bool:
        return first == other

    def prefill(self, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]) -> EvenPrefill:
        return EvenPrefill(self.model, self.lora, prompts, adapters)

    def admit(self, done: EvenPrefill, picks: Sequence[int]) -> Tensor:
        rows_N = torch.tensor(list(picks), device=self.model.device)
        done.cache.reorder_cache(rows_N)  # type: ignore[arg-type]
        self.cache, self.length = done.cache, done.ids_BT.shape[1]
        self.adapters = [done.adapters[pick] for pick in picks]
        return done.logits_BV[rows_N]

    def overflow(self) -> int:
        rows = len(self.adapters)
        return max(0, rows - max(1, self.max_cells // (self.length + 1)))

    def step(self, tokens: Sequence[int]) -> Tensor:
        if self.cache is None:
            raise RuntimeError("a step needs rows: admit some first")
        ids_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        with self.lora.of(self.adapters):
            logits_BV = even_forward(self.model, ids_B1, self.cache, self.length)
        self.length += 1
        return logits_BV

    def drop(self, rows: set[int]) -> list[int]:
        order = [row for row in range(len(self.adapters)) if row not in rows]
        if not order:
            self.clear()
        elif self.cache is not None:
            rows_N = torch.tensor(order, device=self.model.device)
            self.cache.reorder_cache(rows_N)  # type: ignore[arg-type]
            self.adapters = [self.adapters[row] for row in order]
        return order

    def clear(self) -> None:
        self.adapters, self.length, self.cache = [], 0, None
