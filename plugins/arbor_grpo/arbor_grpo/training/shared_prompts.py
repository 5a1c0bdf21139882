"""Log-probabilities of completions with each distinct prompt computed once, whatever many completions it has.

The prompt but for its last token goes through the model once; its keys and values, gradient included, are then
repeated for each completion, and the rest of the sequence goes through the model on top of them. The numbers are those
of the whole sequences; a group of eight costs one prompt instead of eight.

With gradient checkpointing each layer runs a second time in the backward pass. What is kept of the prompt is therefore
written once and read otherwise, so that the second time is as the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer


class Prompt(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values of the distinct prompts, D x heads x P x size, as they were first computed."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        return key_states, value_states


class Repeated(DynamicLayer):  # type: ignore[no-untyped-call]
    """The same for each of B rows, before whatever follows; remembers nothing of that.

    Args:
        of: The prompt of each row: B numbers.
    """

    def __init__(self, keys: Tensor, values: Tensor, of: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.of = keys, values, of
        self.prompts = keys, values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = key_states, value_states
        keys, values = (
            torch.cat([kept.index_select(0, self.of), more], dim=-2)
            for kept, more in zip(self.prompts, new, strict=True)
        )
        return keys, values


def cache(layers: Sequence[Repeated] = ()) -> DynamicCache:
    """Of these layers, or of prompts that are still to be computed."""
    made = DynamicCache()
    made.layers, made.layer_class_to_replicate = list(layers), None if layers else Prompt
    return made


def allow_caches(model: Any) -> None:
    """Let layers that are checkpointed have such a cache. Transformers takes caches away from them, because others
    would be written a second time."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._can_checkpoint_with_cache = True


def for_a_trial(model: Any) -> None:
    """Let nothing be random, but all that can be checkpointed take the path that it takes in training."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True


def scored(
    model: Any, unwrapped: Any, input_ids: Tensor, attention_mask: Tensor, completion: int
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and, where the model's head gives it, entropy of each completion token.

    Args:
        model: With TRL's fused head, as training calls it.
        unwrapped: The same without what accelerate put around it.
        input_ids: B x (P + C): prompts of at least 2 columns, padded on the left, then completions.
        completion: C.

    Returns:
        Two tensors B x C.
    """
    prompts, mask = input_ids[:, :-completion], attention_mask[:, :-completion]
    first, of = distinct(torch.cat([prompts, mask], dim=1))
    prefix, prefix_mask = prompts[first, :-1], mask[first, :-1]
    kept = cache()
    backbone(unwrapped)(
        input_ids=prefix,
        attention_mask=prefix_mask,
        position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=kept,
        use_cache=True,
    )
    layers: list[Any] = kept.layers
    rest, rest_mask = input_ids[:, -completion - 1 :], attention_mask[:, -completion - 1 :]
    labels = rest.masked_fill(rest_mask == 0, -100)
    labels[:, 0] = -100
    starts = prefix_mask.sum(1)[of].unsqueeze(1)
    out = model(
        input_ids=rest,
        attention_mask=torch.cat([prefix_mask[of], rest_mask], dim=1),
        position_ids=starts + torch.arange(completion + 1, device=rest.device),
        past_key_values=cache([Repeated(layer.keys, layer.values, of) for layer in layers]),
        labels=labels,
        fused_lm_head=True,
    )
    return out.log_probs, out.entropy


def placed(model: Any, unwrapped: Any) -> Any:
    """The model, told where each token stands in its own sequence. Prompts are padded on the left, and a model whose
    positions are learned would count the padding."""
    base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
    if "position_ids" not in signature(type(base).forward).parameters:
        return model

    def forward(*, attention_mask: Tensor, **inputs: Any) -> Any:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return model(attention_mask=attention_mask, position_ids=positions, **inputs)

    return forward


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each kind, and of each row its kind."""
    _, of = torch.unique(rows, dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = torch.full((int(of.max()) + 1,), len(rows), device=rows.device)
    return first.scatter_reduce(0, of, places, "amin"), of


def backbone(model: Any) -> Any:
    """The model without its head."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
