"""TRL's `GRPOTrainer` with each distinct prompt computed once, however many completions it has.

The prompt but for its last token goes through the model once; its keys and values, gradient included, are then
repeated for each completion, and the rest of the sequence goes through the model on top of them. The numbers are those
of the whole sequences; a group of eight costs one prompt instead of eight.

With gradient checkpointing each layer runs a second time in the backward pass. What is kept of the prompt is therefore
written once and read otherwise, so that the second time is as the first.

Shape suffixes: B, rows; D, distinct prompts; P, columns of prompts, padded on the left; C, columns of completions,
padded on the right; T = P + C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.grpo_trainer import GRPOTrainer

from .micro_batches import Batch, sequences

TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""How far log-probabilities with shared prompts may be from those without, in nats."""


class SharedPromptsTrainer(GRPOTrainer):
    """Computes each distinct prompt once where the model allows it.

    Args:
        warn: Told why a model does not allow it.
        options: `GRPOTrainer`'s.
    """

    def __init__(self, warn: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self.warn = warn
        self.shares: bool | None = None
        """Whether prompts are shared; None: not tried yet."""
        self.policy: Any = self.model  # typed too loosely by transformers to be used
        self.logps_BC: Tensor | None = None
        """Of the rows that ran last."""
        self.aux: Tensor | None = None
        """Their auxiliary loss, of mixtures of experts."""

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """B x C each. With each distinct prompt computed once where that is possible, else TRL's way."""
        unwrapped = self.accelerator.unwrap_model(model)
        text = all(value is None for value in images.values())
        if self.shares and input_ids.size(1) - logits_to_keep > 1 and text:
            with self.accelerator.autocast():
                logps_BC, entropies_BC = score_completions(model, unwrapped, input_ids, attention_mask, logits_to_keep)
            aux = None
        else:
            logps_BC, entropies_BC, aux = super()._get_per_token_logps_and_entropies(
                with_positions(model, unwrapped) if text else model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
        self.logps_BC, self.aux = logps_BC.detach(), aux
        return logps_BC, entropies_BC if compute_entropy else None, aux

    def can_share(self, micro: Batch) -> bool:
        """Whether prompts computed once give what whole sequences give. Tried on some rows, because no flag says so."""
        ids_BT, mask_BT, length = sequences(micro)
        found: list[Tensor] = []
        allow_caches(self.policy)
        set_trial_mode(self.policy)
        try:
            for shares in (False, True):
                self.shares = shares
                with torch.no_grad():
                    logps_BC, *_ = self._get_per_token_logps_and_entropies(self.model, ids_BT, mask_BT, length)
                found.append(logps_BC.float() * micro["completion_mask"])
            apart = float((found[0] - found[1]).abs().max())
        except Exception as error:  # an architecture may do anything with a cache that it did not make
            self.warn(f"Prompts are not shared: {type(error).__name__}: {error}")
            return False
        finally:
            self.policy.train()
        allowed = TOLERANCE if found[0].dtype == torch.float32 and not self.args.bf16 else HALF_TOLERANCE
        if not apart <= allowed:
            self.warn(f"Prompts are not shared: log-probabilities would differ by {apart:.2g} nats")
        return apart <= allowed


class PromptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values of the distinct prompts, D x heads x P x size, as they were first computed."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        return key_states, value_states


class RepeatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The same for each of B rows, before whatever follows; remembers nothing of that.

    Args:
        prompt_B: The prompt of each row.
    """

    def __init__(self, keys: Tensor, values: Tensor, prompt_B: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.prompt_B = keys, values, prompt_B
        self.prompts = keys, values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = key_states, value_states
        keys, values = (
            torch.cat([kept.index_select(0, self.prompt_B), more], dim=-2)
            for kept, more in zip(self.prompts, new, strict=True)
        )
        return keys, values


def cache(layers: Sequence[RepeatedLayer] = ()) -> DynamicCache:
    """Of these layers, or of prompts that are still to be computed."""
    found = DynamicCache()
    found.layers, found.layer_class_to_replicate = list(layers), None if layers else PromptLayer
    return found


def allow_caches(model: Any) -> None:
    """Let layers that are checkpointed have such a cache. Transformers takes caches away from them, because others
    would be written a second time."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._can_checkpoint_with_cache = True


def set_trial_mode(model: Any) -> None:
    """Let nothing be random, but all that can be checkpointed take the path that it takes in training."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True


def score_completions(
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
    prompts_BP, mask_BP = input_ids[:, :-completion], attention_mask[:, :-completion]
    first_D, prompt_B = distinct(torch.cat([prompts_BP, mask_BP], dim=1))
    prefix_DP, prefix_mask_DP = prompts_BP[first_D, :-1], mask_BP[first_D, :-1]  # P less one
    kept = cache()
    without_head(unwrapped)(
        input_ids=prefix_DP,
        attention_mask=prefix_mask_DP,
        position_ids=(prefix_mask_DP.cumsum(1) - 1).clamp(min=0),
        past_key_values=kept,
        use_cache=True,
    )
    layers: list[Any] = kept.layers
    rest_BC, rest_mask_BC = input_ids[:, -completion - 1 :], attention_mask[:, -completion - 1 :]  # C and one
    labels_BC = rest_BC.masked_fill(rest_mask_BC == 0, -100)
    labels_BC[:, 0] = -100
    starts_B1 = prefix_mask_DP.sum(1)[prompt_B].unsqueeze(1)
    out = model(
        input_ids=rest_BC,
        attention_mask=torch.cat([prefix_mask_DP[prompt_B], rest_mask_BC], dim=1),
        position_ids=starts_B1 + torch.arange(completion + 1, device=rest_BC.device),
        past_key_values=cache([RepeatedLayer(layer.keys, layer.values, prompt_B) for layer in layers]),
        labels=labels_BC,
        fused_lm_head=True,
    )
    return out.log_probs, out.entropy


def with_positions(model: Any, unwrapped: Any) -> Any:
    """The model, told where each token stands in its own sequence. Prompts are padded on the left, and a model whose
    positions are learned would count the padding."""
    base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
    if "position_ids" not in signature(type(base).forward).parameters:
        return model

    def forward(*, attention_mask: Tensor, **inputs: Any) -> Any:
        positions_BT = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return model(attention_mask=attention_mask, position_ids=positions_BT, **inputs)

    return forward


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each of the D kinds, and of each of the B rows its kind."""
    _, kind_B = torch.unique(rows, dim=0, return_inverse=True)
    places_B = torch.arange(len(rows), device=rows.device)
    first_D = torch.full((int(kind_B.max()) + 1,), len(rows), device=rows.device)
    return first_D.scatter_reduce(0, kind_B, places_B, "amin"), kind_B


def without_head(model: Any) -> Any:
    """The model without its head."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
