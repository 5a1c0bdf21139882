"""Keys and values of sequences that come and go: one slot per sequence, position p of a sequence in column p.

Sequences of any length share a forward pass without being aligned to each other: every row writes at its own column
and a mask hides what lies beyond. So a sequence joins by copying a row, leaves by giving its row to the last one, and
nobody is ever shifted or padded again. What lies beyond a row's length is always finite: attention multiplies it
by zero, and zero times NaN is NaN.

Shapes: B rows, T tokens of each in this pass, C columns in view, V vocabulary, H heads of keys and values, D dimension
of a head. Keys and values are [slots, H, allocated columns, D]; transformers names them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import PreTrainedModel

COLUMNS = 64
"""Columns by which rows grow. A multiple of 8, which the GPU's masked attention kernels want."""


def rounded(columns: int) -> int:
    """Columns that are allocated where `columns` are needed."""
    return -(-columns // COLUMNS) * COLUMNS


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values."""

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
        """Write states [B, H, T, D] at the slots' columns; returns all columns in view, [B, H, C, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_B1, columns_BT, width = self.slots.rows_B1, self.slots.columns_BT, self.slots.width
        self.keys[rows_B1, :, columns_BT] = key_states.transpose(1, 2)
        self.values[rows_B1, :, columns_BT] = value_states.transpose(1, 2)
        return self.keys[: len(rows_B1), :, :width], self.values[: len(rows_B1), :, :width]

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
    rows_B1: Tensor
    """The slots in use: 0, 1, 2, ..."""
    columns_BT: Tensor
    """Where each new token's keys and values go."""
    width: int
    """C: columns that the pass attends to."""

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

    def __call__(self, ids_BT: Tensor, positions_BT: Tensor, columns_BT: Tensor, slots: Slots, width: int) -> Tensor:
        """Run tokens and return the logits after each row's last one, [B, V].

        Args:
            ids_BT: Token ids.
            positions_BT: Each token's place in its sequence.
            columns_BT: Where its keys and values go: the position, except for padding.
            slots: Row i of the batch is slot i.
            width: Columns to attend to.
        """
        slots.rows_B1 = torch.arange(len(ids_BT), device=ids_BT.device)[:, None]
        slots.columns_BT, slots.width = columns_BT, width
        output = self.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=self._masks(positions_BT, width),
            past_key_values=slots,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _masks(self, positions_BT: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """What each token attends to, [B, 1, T, C]; one per kind of layer where a model mixes them."""
        columns_C = torch.arange(width, device=positions_BT.device)
        last_B1T1 = positions_BT[:, None, :, None]
        full_B1TC = columns_C <= last_B1T1
        if self.kinds == {"full_attention"}:
            return self._as_model_wants(full_B1TC)
        sliding_B1TC = full_B1TC & (columns_C > last_B1T1 - (self.window or 0))
        if self.kinds == {"sliding_attention"}:
            return self._as_model_wants(sliding_B1TC)
        return {
            "full_attention": self._as_model_wants(full_B1TC),
            "sliding_attention": self._as_model_wants(sliding_B1TC),
        }

    def _as_model_wants(self, visible_B1TC: Tensor) -> Tensor:
        if not self.additive:
            return visible_B1TC
        nothing = torch.zeros((), dtype=self.model.dtype, device=visible_B1TC.device)
        return nothing.where(visible_B1TC, torch.finfo(self.model.dtype).min)
