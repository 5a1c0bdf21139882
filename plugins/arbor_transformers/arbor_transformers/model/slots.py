"""Keys and values of sequences that come and go: one slot per sequence, position p of a sequence in column p.

Sequences of any length share a forward pass without being aligned to each other: every row writes at its own column
and a mask hides what lies beyond. So a sequence joins by copying a row, leaves by giving its row to the last one, and
nobody is ever shifted or padded again. What lies beyond a row's length is always finite: attention multiplies it
by zero, and zero times NaN is NaN.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import PreTrainedModel

COLUMNS = 64
"""Rows grow by so many columns. A multiple of 8, which the GPU's masked attention kernels want."""


def rounded(columns: int) -> int:
    """Columns that are allocated when so many are needed."""
    return -(-columns // COLUMNS) * COLUMNS


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, each [rows, heads, columns, head dimension]."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: "Slots") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.slots.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, tokens, dimension] at the slots' columns; returns all columns in view."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns, width = self.slots.rows, self.slots.columns, self.slots.width
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width

    def get_max_length(self) -> int:
        return -1

    def resize(self, rows: int, columns: int) -> None:
        """Copy into tensors of another size; what does not fit is not needed any more."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            part = new[: old.shape[0], :, : old.shape[2]]
            part.copy_(old[: part.shape[0], :, : part.shape[2]])
            setattr(self, name, new)


class Slots(Cache):
    """All layers' slots, and where the forward pass in progress writes.

    Args:
        rows: Slots to allocate.
        columns: Columns to allocate.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]
    rows: Tensor
    """[rows, 1], the slots in use: 0, 1, 2, ..."""
    columns: Tensor
    """[rows, tokens], where each new token's keys and values go."""
    width: int
    """How many columns the pass attends to."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(layer_class_to_replicate=partial(SlotLayer, self))  # type: ignore[arg-type]
        self.capacity = (rows, columns)

    def resize(self, rows: int, columns: int) -> None:
        self.capacity = (rows, columns)
        for layer in self.layers:
            layer.resize(rows, columns)

    def copy_row(self, source: int, target: int) -> None:
        """Make one slot equal to another, to the last column."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]

    def take(self, other: "Slots", source: int, target: int, length: int) -> None:
        """Fill a slot with the first `length` columns of another cache's slot."""
        while len(self.layers) < len(other.layers):
            self.layers.append(SlotLayer(self))
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            for slot, block in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                slot[target, :, :length] = block[source, :, :length]
                slot[target, :, length:] = 0


class SlotForward:
    """Calls the model over slots with the masks that its layers want.

    Args:
        model: The model.
        layer_types: `full_attention` or `sliding_attention` per layer.
        window: Tokens that a sliding layer sees, the present one included.
    """

    def __init__(self, model: PreTrainedModel, layer_types: Sequence[str], window: int | None) -> None:
        self.model, self.kinds, self.window = model, set(layer_types), window
        self.additive = model.config._attn_implementation == "eager"

    def __call__(self, tokens: Tensor, positions: Tensor, columns: Tensor, slots: Slots, width: int) -> Tensor:
        """Run `tokens` [rows, t] and return the logits after each row's last one, [rows, vocabulary].

        Args:
            tokens: Ids.
            positions: Each token's place in its sequence, [rows, t].
            columns: Where its keys and values go, [rows, t]; the position, except for padding.
            slots: Row i of the batch is slot i.
            width: Columns to attend to.
        """
        slots.rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        slots.columns, slots.width = columns, width
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(positions, width),
            past_key_values=slots,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _masks(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """[rows, 1, t, width]; one per kind of layer where a model mixes them."""
        columns = torch.arange(width, device=positions.device)
        last = positions[:, None, :, None]
        full = columns <= last
        if self.kinds == {"full_attention"}:
            return self._as_model_wants(full)
        sliding = full & (columns > last - (self.window or 0))
        if self.kinds == {"sliding_attention"}:
            return self._as_model_wants(sliding)
        return {"full_attention": self._as_model_wants(full), "sliding_attention": self._as_model_wants(sliding)}

    def _as_model_wants(self, visible: Tensor) -> Tensor:
        if not self.additive:
            return visible
        nothing = torch.zeros((), dtype=self.model.dtype, device=visible.device)
        return nothing.where(visible, torch.finfo(self.model.dtype).min)
