"""Attention on a CPU without copying keys and values for every query head that shares them.

transformers repeats the heads of a masked grouped-query attention in memory before it calls torch, because CUDA's
kernels want that; torch's CPU kernel does not. While decoding, those copies took longer than the attention itself.

Shapes: B rows, H heads of the query, T tokens, D dimension of a head. transformers names the arguments.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

NAME = "arbor_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """`sdpa` of transformers for one layer: query [B, H, T, D] to mixed values [B, T, H, D]."""
    if attention_mask is None or rest.get("position_bias") is not None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)
        return output, None
    mixed_BHTD = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return mixed_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Switch a model that was loaded with `sdpa` on a CPU; other models stay as they are."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
