"""The end of every job on TRL: a checkpoint is opened once, as an engine will, before it is named the result."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from arbor_core import Checkpoint, JobFailed, Run

from .job import result_of
from .model import autocast, load_model, uses_cuda

PROBE = "Hello"
ANSWER_TOKENS = 4
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class UnusableError(ValueError):
    """A result that no engine could serve; the message says why."""


def finish(run: Run[Any], step: int, tokens: int, policy: nn.Module | None = None) -> None:
    """Name the checkpoint of a step as the job's model, if it answers.

    Args:
        tokens: That the job was trained on, in all its steps.
        policy: What was trained, which nobody needs any more: its memory is used to open the checkpoint. None: an
            earlier attempt has trained it.

    Raises:
        JobFailed: `checkpoint_lost`: there is no such checkpoint; `result_unusable`: no engine could serve it.
    """
    if run.rank:
        return  # one of the ranks says it
    checkpoint = result_of(run, step)
    try:
        check(run, checkpoint, policy)
    except torch.OutOfMemoryError:  # an engine may have more
        run.message("The result was not opened: there was no memory left for it", "warn")
    run.finish(checkpoint, tokens, adapter=run.config.lora is not None)


def check(run: Run[Any], checkpoint: Checkpoint, policy: nn.Module | None) -> None:
    """Have the files of a checkpoint answer a prompt. One that does not answer is no model.

    Raises:
        JobFailed: `result_unusable`.
    """
    folder = checkpoint.dir
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = opened(run, folder, policy)
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=autocast(run)):
            answer(model, tokenizer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, PEFT and safetensors raise many kinds
        reason = str(error) if isinstance(error, UnusableError) else f"{type(error).__name__}: {error}"
        run.withdraw_checkpoint(checkpoint, reason)
        raise JobFailed(
            f"the model of step {checkpoint.step} was trained, but cannot be used: {reason}. If its weights are not "
            "numbers, lower the learning rate; checkpoints of earlier steps may be whole",
            code="result_unusable",
        ) from error


def withdraw_if_not_finite(run: Run[Any]) -> None:
    """Withdraw the newest checkpoint if its weights are not finite: a loss that is no number may come of them. Had they
    been so earlier, the loss would have been, too."""
    newest = run.last_checkpoint()
    if newest is None or newest.resume_only:
        return
    try:
        for path in sorted(newest.dir.glob("*.safetensors")):
            check_finite(load_file(path).items())
    except UnusableError as error:
        run.withdraw_checkpoint(newest, str(error))


def opened(run: Run[Any], folder: Path, policy: nn.Module | None) -> nn.Module:
    """A checkpoint as a model that answers. An adapter takes the place of that which was trained, on the same base."""
    sharded = policy is not None and any(map(is_sharded, policy.parameters()))
    if run.config.lora is None:
        if policy is not None:
            release(policy)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        check_finite(model.named_parameters())
    elif policy is None or sharded:
        model = PeftModel.from_pretrained(load_model(run), str(folder))
    else:
        weights = load_file(folder / ADAPTER_WEIGHTS)
        check_finite(weights.items())
        found: Any = set_peft_model_state_dict(policy, weights, adapter_name="default")
        if found.unexpected_keys:
            raise UnusableError(f"its adapter has weights that belong nowhere, {found.unexpected_keys[0]} for one")
        return policy.eval()
    return model.to("cuda" if uses_cuda(run) and not sharded else "cpu").eval()


def release(policy: nn.Module) -> None:
    """Give back the memory of a model that is not needed any more."""
    for tensor in (*policy.parameters(), *policy.buffers()):
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether other ranks hold parts of it (FSDP, DeepSpeed)."""
    return type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id")


def check_finite(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Look at all weights.

    Raises:
        UnusableError: one is infinite or no number.
    """
    for name, tensor in weights:
        if not torch.isfinite(tensor).all():
            raise UnusableError(f"its weights {name} are not all finite")


@torch.no_grad()
def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The likeliest answer to the probe, a few tokens of it.

    Raises:
        UnusableError: the model has no finite log-probabilities for it.
    """
    device = next(model.parameters()).device
    ids = prompt_ids(tokenizer, PROBE)
    found: list[int] = []
    for _ in range(ANSWER_TOKENS):
        logits_V = model(input_ids=torch.tensor([[*ids, *found]], device=device)).logits[0, -1].float()
        likeliest = int(logits_V.argmax())
        if logits_V.isnan().any() or not torch.isfinite(logits_V.log_softmax(-1)[likeliest]):
            raise UnusableError("its log-probabilities are not finite")
        found.append(likeliest)
    return found


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """What a user says as tokens, at least one."""
    encoded: Any = None
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        with suppress(Exception):  # the template may want another conversation
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list((encoded or tokenizer(prompt))["input_ids"]) or [0]
