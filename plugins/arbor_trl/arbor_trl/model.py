"""The base model and its tokenizer, on the run's device; the tokens at which generation ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arbor_core import JobFailed, Run

from . import LoraSettings
from .vocabulary import readable

DEFAULT_CONTEXT = 2048


def uses_cuda(run: Run[Any]) -> bool:
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


def autocast(run: Run[Any]) -> bool:
    """Whether to compute in bfloat16."""
    if run.config.dtype == "auto":
        return uses_cuda(run) and bool(torch.cuda.is_bf16_supported())
    return bool(run.config.dtype == "bfloat16")


def load_tokenizer(run: Run[Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(run.model, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub raise many kinds
        raise unavailable(run, "tokenizer", error) from error


def load_model(run: Run[Any]) -> PreTrainedModel:
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
            config=readable(AutoConfig.from_pretrained(run.model, trust_remote_code=False)),
            dtype=torch.bfloat16 if half else torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:
        raise unavailable(run, "model", error) from error
    model.config.use_cache = False
    return model


def unavailable(run: Run[Any], what: str, error: Exception) -> JobFailed:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return JobFailed(f"cannot load the {what} of {run.model}: {reason}", code="model_unavailable", param="model")


def context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest sequence the model takes, in tokens."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found or min(tokenizer.model_max_length, DEFAULT_CONTEXT))


def begin(run: Run[Any], model: PreTrainedModel) -> tuple[Any, LoraConfig | None]:
    """What is trained, for TRL: the adapter that the job goes on with, on `model`; or `model`, and the settings of a
    new adapter if there is to be one. Generation ends at the tokens at which that adapter's did, too.

    Raises:
        JobFailed: `invalid_hyperparameters`: all weights are to be trained, but the job begins with an adapter.
    """
    if run.adapter is None:
        return model, adapter(run.config.lora) if run.config.lora else None
    if run.config.lora is None:
        raise JobFailed(
            "lora is null, but the model is an adapter, which can only be trained as one: leave lora out",
            code="invalid_hyperparameters",
            param="hyperparameters",
        )
    add_end_tokens(model, adapter_end_tokens(run.adapter))
    return PeftModel.from_pretrained(model, run.adapter, is_trainable=True), None


def adapter(settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


def end_tokens(config: GenerationConfig | None) -> list[int]:
    """The tokens at which generation ends."""
    ends = config.eos_token_id if config else None
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def add_end_tokens(model: PreTrainedModel, tokens: Iterable[int]) -> None:
    """Let generation end at these tokens too: a base model may know another one only. Full weights are saved with
    them."""
    known = end_tokens(model.generation_config)
    if new := sorted(set(tokens) - set(known)):
        model.generation_config.eos_token_id = [*known, *new]


def write_end_tokens(model: PreTrainedModel, folder: Path) -> None:
    """Write them beside an adapter, where engines read them; transformers does so for full weights only."""
    ends = model.generation_config.eos_token_id
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)  # type: ignore[no-untyped-call]


def adapter_end_tokens(folder: Path) -> list[int]:
    """Those that were written beside an adapter."""
    there = (folder / "generation_config.json").is_file()
    return end_tokens(GenerationConfig.from_pretrained(folder) if there else None)
