"""Prompts that each named checkpoint answers, so that people can read how a policy changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from arbor_core import Run

from .model import autocast
from .result import is_sharded, prompt_ids

ANSWER_TOKENS = 128


def answer_probes(run: Run[Any], trainer: Any, name: str, step: int) -> None:
    """Have a trainer's policy answer the job's probes and keep that with its samples. Draws no random number, and
    leaves the policy as it was. Rank 0 calls it.

    Args:
        trainer: One of TRL's, with the policy.
        name: Of the checkpoint that holds the policy.
    """
    probes: list[str] = run.config.probes
    if not probes:
        return
    policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    if any(map(is_sharded, policy.parameters())):
        run.message("Probes are not answered: the policy is spread over several processes", "warn")
        return
    training = policy.training
    policy.eval()
    try:
        answers = [(prompt, answered(run, policy, tokenizer, prompt)) for prompt in probes]
    finally:
        policy.train(training)
    run.report_probes(name, step, answers)


@torch.no_grad()
def answered(run: Run[Any], policy: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The likeliest answer to a prompt, up to its end or `ANSWER_TOKENS`."""
    generation: Any = getattr(policy, "generation_config", None)
    device = next(policy.parameters()).device
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast(run)):
        found = policy.generate(  # type: ignore[operator]  # of every causal model
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=generation.eos_token_id if generation else None,
        )
    return str(tokenizer.decode(found[0, ids.size(1) :], skip_special_tokens=True))
