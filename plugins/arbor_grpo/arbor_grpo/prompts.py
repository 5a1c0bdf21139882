"""Log-probabilities of completions with each distinct prompt computed once, whatever many completions it has.

The prompt but for its last token goes through the model once; its keys and values, gradient included, are then
repeated for each completion, and the rest of the sequence goes through the model on top of them. The numbers are those
of the whole sequences; a group of eight costs one prompt instead of eight.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache


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
    cache = DynamicCache()
    backbone(unwrapped)(
        input_ids=prefix,
        attention_mask=prefix_mask,
        position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    repeated = DynamicCache()
    layers: list[Any] = list(cache.layers)
    for number, layer in enumerate(layers):
        repeated.update(layer.keys.index_select(0, of), layer.values.index_select(0, of), number)
    rest, rest_mask = input_ids[:, -completion - 1 :], attention_mask[:, -completion - 1 :]
    labels = rest.masked_fill(rest_mask == 0, -100)
    labels[:, 0] = -100
    starts = prefix_mask.sum(1)[of].unsqueeze(1)
    out = model(
        input_ids=rest,
        attention_mask=torch.cat([prefix_mask[of], rest_mask], dim=1),
        position_ids=starts + torch.arange(completion + 1, device=rest.device),
        past_key_values=repeated,
        labels=labels,
        fused_lm_head=True,
    )
    return out.log_probs, out.entropy


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each kind, and of each row its kind."""
    _, of = torch.unique(rows, dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = torch.full((int(of.max()) + 1,), len(rows), device=rows.device)
    return first.scatter_reduce(0, of, places, "amin"), of


def backbone(model: Any) -> Any:
    """The model without its head."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
