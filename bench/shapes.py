"""Models of the benches: the tiny one, and shapes with random weights that a GPU is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from arbor_sft import tiny
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "100MB": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6},
    "0.4B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 32_768,
    },
}
"""By name; what differs from the tiny model. `0.4B` is Qwen2.5-0.5B's with fewer words; the tokenizer stays that of the
tiny model."""


def make(folder: Path, shape: str) -> None:
    """Write a model of this shape."""
    tiny.make(folder)
    if not SHAPES[shape]:
        return
    config = Qwen2Config.from_pretrained(folder, **SHAPES[shape])
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.initializer_range = 0.02
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
