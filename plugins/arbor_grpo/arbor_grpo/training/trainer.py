"""TRL's `GRPOTrainer`, fed with groups from outside.

Three of its methods are replaced. `_generate_and_score_completions` returns the next groups of the inbox as a ready
batch. `training_step` cuts the batch into micro-batches itself, because groups vary in size and TRL's accumulation
takes them to be equal. `_get_per_token_logps_and_entropies` computes each distinct prompt once. The losses are TRL's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import msgspec
import numpy as np
import safetensors.torch
import torch
from accelerate.utils import DistributedType
from arbor_trl.budget import Budget
from arbor_trl.saving import Saving
from torch import Tensor
from torch.utils.data import DataLoader
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import use_adapter

from arbor_core import Run
from arbor_grpo import GrpoConfig

from . import metrics, shared_prompts
from .micro_batches import Batch, Sizes, cut, dealt, part, share, sizes, tensors, weight
from .ratios import correction
from .rows import Row
from .session import Session
from .state import PLACE, REFERENCE

NO_END = 10**9
"""Steps of a run without `max_steps`."""
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""How far log-probabilities with shared prompts may be from those without, in nats."""


class GroupTrainer(Saving, GRPOTrainer):
    """Trains on the groups that `session` gathers.

    Args:
        options: `GRPOTrainer`'s.
    """

    def __init__(self, run: Run[GrpoConfig], session: Session, limits: Budget, **options: Any) -> None:
        super().__init__(**options)
        self.run, self.session, self.limits = run, session, limits
        if run.config.importance_sampling_mode:
            self.use_vllm = True  # TRL applies the ratio of `importance_sampling_mode` only then
        self.current_gradient_accumulation_steps = 1  # TRL divides its losses by it
        self.shares: bool | None = None
        if not run.config.share_prompts or run.world_size > 1:
            self.shares = False
        self.aux_coefficient = 0.0
        if self.aux_loss_enabled:
            self.shares = False
            # TRL would add the whole of it for each micro-batch, so that it grew with their number: see `micro_step`
            self.aux_coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, 0.0
        self.policy: Any = self.model  # typed too loosely by transformers to be used
        self.batch: Batch = {}
        self.parts: list[list[int | None]] = []
        self.count = self.tokens = self.running = 0
        self.micro: Batch = {}
        self.logps: Tensor | None = None
        self.aux: Tensor | None = None

    def get_train_dataloader(self) -> Any:
        """Nothing but a clock: the batches come from the session. Draws no random number."""
        steps = self.args.max_steps
        return DataLoader(range(steps), collate_fn=list, generator=torch.Generator())  # type: ignore[arg-type]

    def save(self) -> None:
        """Write the checkpoint of this step."""
        self._save_checkpoint(self.model, None)

    def numbers(self) -> Mapping[str, float]:
        return self.session.reported

    def files(self) -> Mapping[str, bytes]:
        found = {PLACE: msgspec.json.encode(self.session.place)}
        if self.run.config.sync_ref_model:
            parameters = self.accelerator.unwrap_model(self.ref_model).named_parameters()
            found[REFERENCE] = safetensors.torch.save({name: value.detach() for name, value in parameters})
        return found

    # --- the ready batch ----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """The next groups as a batch; what happens between batches happens in here, while it waits for them."""
        rows = self.session.next_rows()
        self.count, self.tokens = len(rows), sum(row.tokens for row in rows)
        batch = tensors(rows, self._tokenizer.pad_token_id, self.accelerator.device)
        found = sizes(rows)
        learned = [number for number, row in enumerate(rows) if self.matters(row)]
        if learned and self.shares is None:
            self.shares = self.can_share(batch, learned)
        self.parts, self.running = self.cut(found, learned), len(learned)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.policy, checkpointing):
            self.add_old(batch, rows)
            if self.beta != 0.0:
                batch["ref_per_token_logps"] = self.reference(batch)
        return batch

    def matters(self, row: Row) -> bool:
        """Whether the row can move a weight. Others count in the normaliser and do not run through the model."""
        flat = (
            row.advantage == 0 and self.beta == 0.0 and self.top_entropy_quantile == 1.0 and not self.aux_loss_enabled
        )
        return row.tokens > 0 and not flat

    def cut(self, found: Sizes, learned: list[int]) -> list[list[int | None]]:
        """This rank's micro-batches, by row numbers; every rank has as many, of as many rows."""
        most = self.run.config.micro_batch_size
        most_rows = None if most == "auto" else most
        ranks, share = self.run.world_size, self.run.micro_batch_share
        if not learned:
            return [[None]]  # a loss of 0: the optimizer's step is that of a zero gradient
        if ranks == 1:
            here = np.array(learned)
            return [
                [learned[i] for i in rows]
                for rows in cut(found.of(here), self.limits, most_rows, shared=bool(self.shares), share=share)
            ]
        hands = dealt(learned, found, ranks)
        units = [[row for row in unit if row is not None] for unit in zip(*hands, strict=True)]
        longest = Sizes(
            np.arange(len(units)),
            np.array([max(found.prompt_tokens[unit]) for unit in units]),
            np.array([max(found.completion_tokens[unit]) for unit in units]),
        )
        mine = hands[self.run.rank]
        return [[mine[i] for i in rows] for rows in cut(longest, self.limits, most_rows, shared=False, share=share)]

    def add_old(self, batch: Batch, rows: Sequence[Row]) -> None:
        """What the ratio divides by. Absent, TRL takes the policy's own of this moment without its gradient."""
        config = self.run.config
        sampling = batch.get("sampling_per_token_logps")
        if config.ratio == "sampler" and sampling is not None:
            unknown = sampling.isnan()
            if unknown.any():
                sampling = torch.where(unknown, self.over_parts(batch, self.model)[0], sampling)
            batch["old_per_token_logps"] = sampling
        elif self.num_iterations > 1 or config.importance_sampling_mode:
            batch["old_per_token_logps"] = self.over_parts(batch, self.model)[0]
        if config.importance_sampling_mode:
            batch["importance_sampling_ratio"] = correction(batch, config)

    def reference(self, batch: Batch) -> Tensor:
        """Log-probabilities of the reference: a model of its own, the adapter that training began with, or none."""
        if self.ref_model is not None:
            return self.over_parts(batch, self.ref_model)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.over_parts(batch, self.model)[0]

    def over_parts(self, batch: Batch, model: Any, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of this rank's rows, B x C; 0 elsewhere."""
        shape = batch["completion_ids"].shape
        logps, entropies = (torch.zeros(shape, device=batch["advantages"].device) for _ in range(2))
        for rows in self.parts:
            micro = part(batch, rows)
            ids = torch.cat([micro["prompt_ids"], micro["completion_ids"]], dim=1)
            mask = torch.cat([micro["prompt_mask"], micro["completion_mask"]], dim=1)
            length = micro["completion_ids"].size(1)
            found, spread, _ = self._get_per_token_logps_and_entropies(
                model, ids, mask, length, compute_entropy=entropy
            )
            real = [(place, row) for place, row in enumerate(rows) if row is not None]
            places, numbers = ([pair[i] for pair in real] for i in range(2))
            logps[numbers, :length] = found[places].float()
            if spread is not None:
                entropies[numbers, :length] = spread[places].float()
        return logps, entropies

    # --- one optimizer step -------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The gradient of the whole batch, micro-batch by micro-batch; returns the batch's loss."""
        model.train()
        if self._step % self.num_iterations == 0:
            self.batch = self._generate_and_score_completions(inputs)
        self.session.began = time.perf_counter()
        if self.top_entropy_quantile < 1.0:
            self.batch["entropy_mask"] = self.highest_entropies()
        gathered = metrics.Parts(self._metrics["train"], self.importance_sampling_level)
        loss = torch.zeros((), device=self.accelerator.device)
        for number, rows in enumerate(self.parts):
            loss += self.micro_step(model, rows, gathered, last=number == len(self.parts) - 1)
        gathered.combine(self.accelerator)
        self._step += 1
        return loss

    def micro_step(self, model: Any, rows: list[int | None], gathered: metrics.Parts, *, last: bool) -> Tensor:
        self.micro = part(self.batch, rows)
        self.accelerator.gradient_state._set_sync_gradients(last)
        together = last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with nullcontext() if together else self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self.micro)
            loss = loss * weight(self.loss_type, self.micro, self.count, self.tokens, self.run.world_size)
            if self.aux is not None:
                loss = loss + self.aux_coefficient * share(rows, self.running, self.run.world_size) * self.aux
            options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
            self.accelerator.backward(loss, **options)
        gathered.add(self.micro, self.logps)
        return torch.as_tensor(loss.detach())

    def highest_entropies(self) -> Tensor:
        """Which tokens of the batch are learned with `top_entropy_quantile`: B x C. Of a micro-batch alone, the
        threshold would be another."""
        mine = torch.zeros_like(self.batch["tool_mask"])
        mine[[row for rows in self.parts for row in rows if row is not None]] = 1
        mask = self.batch["completion_mask"] * self.batch["tool_mask"] * mine
        with torch.no_grad():
            _, entropies = self.over_parts(self.batch, self.model, entropy=True)
        mask_of_all = super().get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
        return torch.as_tensor(mask_of_all)

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """The micro-batch's part of `highest_entropies`."""
        del entropies, mask, threshold  # they were looked at for the whole batch
        return self.micro["entropy_mask"]

    # --- log-probabilities --------------------------------------------------------------------------------------------

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
                logps, entropies = shared_prompts.scored(model, unwrapped, input_ids, attention_mask, logits_to_keep)
            aux = None
        else:
            logps, entropies, aux = super()._get_per_token_logps_and_entropies(
                shared_prompts.placed(model, unwrapped) if text else model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
        self.logps, self.aux = logps.detach(), aux
        return logps, entropies if compute_entropy else None, aux

    def can_share(self, batch: Batch, learned: list[int]) -> bool:
        """Whether prompts computed once give what whole sequences give. Tried, because no flag says so."""
        micro = part(batch, learned[:2])
        ids = torch.cat([micro["prompt_ids"], micro["completion_ids"]], dim=1)
        mask = torch.cat([micro["prompt_mask"], micro["completion_mask"]], dim=1)
        length = micro["completion_ids"].size(1)
        found: list[Tensor] = []
        shared_prompts.allow_caches(self.policy)
        shared_prompts.for_a_trial(self.policy)
        try:
            for shares in (False, True):
                self.shares = shares
                with torch.no_grad():
                    logps, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, length)
                found.append(logps.float() * micro["completion_mask"])
            apart = float((found[0] - found[1]).abs().max())
        except Exception as error:  # an architecture may do anything with a cache that it did not make
            self.run.message(f"Prompts are not shared: {type(error).__name__}: {error}", "warn")
            return False
        finally:
            self.policy.train()
        allowed = TOLERANCE if found[0].dtype == torch.float32 and not self.args.bf16 else HALF_TOLERANCE
        if not apart <= allowed:
            self.run.message(f"Prompts are not shared: log-probabilities would differ by {apart:.2g} nats", "warn")
        return apart <= allowed
