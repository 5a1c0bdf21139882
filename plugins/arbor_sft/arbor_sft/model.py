"""The base model and its tokenizer, on the run's device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from arbor_core import JobFailed, Run

from . import LoraSettings, SftConfig
from .batches import Collate
from .chat import Sample
from .plan import Budget

FEWEST_TOKENS, MOST_TOKENS = 1024, 65_536
"""Bounds of a micro-batch's size where memory alone would not set them."""
CPU_OVERHEAD, CUDA_OVERHEAD = 128, 2_048
"""Tokens that could be trained in the time of one more micro-batch. Measured on two cores with a million weights: with
log-normal lengths and 16 rows a step, six to eight micro-batches are the fastest."""
CPU_SHARE, CUDA_SHARE = 0.125, 0.5
"""Of the memory there is, for activations. Not of what is free: a resumed run must choose the same."""
KEPT = 17
"""Numbers kept for the backward pass, per token, layer and hidden unit (Korthikanti et al. 2022, equation 1)."""
DEFAULT_CONTEXT = 2048
PROBE_TOKENS = 64


def uses_cuda(run: Run[SftConfig]) -> bool:
    """Whether the run trains on a GPU.

    Raises:
        JobFailed: it holds one that this process cannot reach.
    """
    leased = any(device.kind == "cuda" for device in run.devices)
    if leased and not torch.cuda.is_available():
        raise JobFailed(
            "the job was given a GPU, but torch finds none in the worker: run `arbor doctor`", code="device_unavailable"
        )
    return leased


def autocast(run: Run[SftConfig]) -> bool:
    """Whether to compute in bfloat16."""
    if run.config.dtype == "auto":
        return uses_cuda(run) and bool(torch.cuda.is_bf16_supported())
    return run.config.dtype == "bfloat16"


def budget(run: Run[SftConfig], model: PreTrainedModel) -> Budget:
    """How large micro-batches may get."""
    config = model.config.get_text_config()
    kept = 1 if run.config.gradient_checkpointing else KEPT
    per_token = config.num_hidden_layers * config.hidden_size * kept * (2 if autocast(run) else 4)
    if uses_cuda(run):
        memory, overhead = CUDA_SHARE * torch.cuda.get_device_properties(0).total_memory, CUDA_OVERHEAD
    else:
        memory, overhead = CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), CPU_OVERHEAD
    return Budget(min(MOST_TOKENS, max(FEWEST_TOKENS, int(memory / per_token))), overhead)


def load_tokenizer(run: Run[SftConfig]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(run.model, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub raise many kinds
        raise unavailable(run, "tokenizer", error) from error


def load_model(run: Run[SftConfig]) -> PreTrainedModel:
    """The base model. An adapter's base is kept in the computing type, full weights in float32 (AdamW's small updates
    would be lost in bfloat16).

    Raises:
        JobFailed: `model_unavailable`.
    """
    half = autocast(run) and run.config.lora is not None
    options: dict[str, Any] = {} if run.config.attention == "auto" else {"attn_implementation": run.config.attention}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            run.model,
            dtype=torch.bfloat16 if half else torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:
        raise unavailable(run, "model", error) from error
    model.config.use_cache = False
    return model


def unavailable(run: Run[SftConfig], what: str, error: Exception) -> JobFailed:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return JobFailed(f"cannot load the {what} of {run.model}: {reason}", code="model_unavailable", param="model")


def context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest sequence the model takes, in tokens."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found or min(tokenizer.model_max_length, DEFAULT_CONTEXT))


def adapter(settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


@torch.no_grad()
def tells_rows_apart(model: PreTrainedModel, samples: Sequence[Sample]) -> bool:
    """Whether two rows in one sequence give the logits that they give alone. Tried, because no flag says so."""
    two = [sample.cut(PROBE_TOKENS) for sample in samples[:2]] * (2 if len(samples) == 1 else 1)
    model.train(False)

    def logits(rows: Sequence[Sample]) -> torch.Tensor:
        inputs = Collate(rows, 0).one_sequence(rows)
        ids, positions = (inputs[key].to(model.device) for key in ("input_ids", "position_ids"))
        found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        return found

    alone, together = torch.cat([logits([row]) for row in two]), logits(two)
    model.train()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((alone - together).abs().max() <= tolerance * alone.abs().max())
