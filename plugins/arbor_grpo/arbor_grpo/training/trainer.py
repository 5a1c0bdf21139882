"""TRL's `GRPOTrainer` on groups from outside. The losses are TRL's (`_compute_loss`). Every departure from TRL 1.16:

Batches
- Ready batches come from a `BatchSource`: `_generate_and_score_completions` samples nothing and grades nothing.
- TRL's data set is a clock that counts steps: nothing is buffered, split or shuffled, or skipped on resuming.
- Groups may have any size, and prompts of their own for each row; TRL wants `num_generations` rows of one prompt.
- A trajectory may be several rows, which share its advantage; it counts once in its group's mean and deviation.
- Advantages that a client sends are taken as they are; deviations of one reward are 0 (rows.py).
- `soft_completion_penalty_length` scales positive rewards towards 0; TRL's function for length subtracts up to 1.
- Completions are truncated where the client says so; TRL looks at their last token. Left out by
  `mask_truncated_completions`, they stay visible to attention, with a zero mask in the loss.
- `epsilon_high` null is 5 for cispo, which clips at it; TRL takes `epsilon`.

Log-probabilities
- With `ratio: sampler` the old ones are those at which tokens were sampled, the trainer's own only where those are not
  known; TRL takes the trainer's own in any case.
- `importance_sampling_mode` needs no vLLM: `use_vllm` is set, because TRL applies the ratio only then.
- Each distinct prompt is computed once, where a trial shows the same numbers (`SharedPromptsTrainer`).
- Positions are counted from each prompt's first token; TRL passes none, so learned positions count the padding.

Steps
- One call of `training_step` is a whole optimizer step: it cuts the batch into ragged micro-batches of least cost,
  while TRL accumulates over batches of equal size. TRL's division by their number is switched off.
- Each micro-batch's loss is weighted by its rows or tokens, so that the sum is the loss of the step, whatever the cut.
- Rows that cannot move a weight (no token to learn, or advantage 0 where nothing else matters) count in the mean and do
  not run. Where no row has anything to teach none runs, and the optimizer is left alone, its momentum and weight decay
  included. Jobs with `training_version` 1 run one row with a zero mask: their step is that of a zero gradient.
- Ranks run micro-batches of as many rows each; rows that one lacks are padded with rows of a zero mask.
- The threshold of `top_entropy_quantile` is that of the whole batch, not of a micro-batch.
- The auxiliary loss of mixtures of experts is its mean over the rows that run; TRL adds it once for each micro-batch.
- Metrics of micro-batches are combined by tokens or rows, least and greatest as such (metrics.py); TRL averages them.

Checkpoints
- They are written between batches alone, when the session calls `save`: there the position in the inbox, which is in
  them, and the optimizer agree, so that a resumed job goes on bit by bit.
- A reference model that moves is in them. The frozen copy of the adapter that training began with is not: TRL makes it
  again from that adapter (`CheckpointMixin`).

Shape suffixes: B, rows; P, columns of prompts; C, columns of completions; T = P + C.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from accelerate.utils import DistributedType
from arbor_trl.budget import Budget
from arbor_trl.partition import Sizes, cut
from arbor_trl.saving import CheckpointMixin
from arbor_trl.steps import ScheduleMixin
from torch import Tensor
from torch.utils.data import DataLoader
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from arbor_core import RolloutRun
from arbor_grpo import GrpoConfig

from . import metrics
from .micro_batches import (
    Batch,
    RowNumbers,
    deal,
    learned_mask,
    longest_of,
    sampling_correction,
    select,
    sequences,
    share_of_rows,
    sizes,
    tensors,
    weight,
)
from .rows import Row
from .shared_prompts import SharedPromptsTrainer

REFERENCE = "reference.safetensors"
"""File in a checkpoint: the reference model, where it moves."""


class BatchSource(Protocol):
    """Where batches come from, and what a checkpoint holds beside the model."""

    def next_rows(self) -> list[Row]:
        """Wait for the next batch; its rows."""
        ...

    def checkpoint_metrics(self) -> Mapping[str, float]: ...
    def checkpoint_files(self) -> Mapping[str, bytes]: ...


class GroupTrainer(CheckpointMixin, ScheduleMixin, SharedPromptsTrainer):
    """Trains on the rows of `source`, which is set before training.

    Args:
        padding: The id to pad with.
        options: `GRPOTrainer`'s.
    """

    source: BatchSource

    def __init__(self, run: RolloutRun[GrpoConfig], limits: Budget, padding: int, **options: Any) -> None:
        super().__init__(lambda text: run.message(text, "warn"), **options)
        self.run, self.limits, self.padding = run, limits, padding
        if run.config.importance_sampling_mode:
            self.use_vllm = True  # TRL applies the ratio of `importance_sampling_mode` only then
        self.current_gradient_accumulation_steps = 1  # TRL divides its losses by it
        if not run.config.share_prompts or run.world_size > 1 or self.aux_loss_enabled:
            self.shares = False
        self.aux_coefficient = 0.0
        if self.aux_loss_enabled:
            # TRL would add the whole of it for each micro-batch, so that it grew with their number: see `micro_step`
            self.aux_coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, 0.0
        self.batch: Batch = {}
        self.batch_ready_at = 0.0
        """When training on the batch began, on `time.perf_counter`."""
        self.parts: list[RowNumbers] = []
        self.count = self.tokens = self.running = 0
        """Rows of the step, those of its tokens with a loss, and rows that run."""
        self.micro: Batch = {}

    def get_train_dataloader(self) -> Any:
        """Nothing but a clock: the batches come from `source`. Draws no random number."""
        steps = self.args.max_steps
        return DataLoader(range(steps), collate_fn=list, generator=torch.Generator())  # type: ignore[arg-type]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of this step."""
        self._save_checkpoint(self.model, None)

    def checkpoint_metrics(self) -> Mapping[str, float]:
        return self.source.checkpoint_metrics()

    def checkpoint_files(self) -> Mapping[str, bytes]:
        files = dict(self.source.checkpoint_files())
        if self.run.config.sync_ref_model:
            parameters = self.accelerator.unwrap_model(self.ref_model).named_parameters()
            files[REFERENCE] = safetensors.torch.save({name: value.detach() for name, value in parameters})
        return files

    def load_reference(self, checkpoint: Path) -> None:
        """Take the reference model of a checkpoint, if it has one."""
        if self.ref_model is not None and (checkpoint / REFERENCE).is_file():
            for name, tensor in safetensors.torch.load_file(checkpoint / REFERENCE).items():
                self.ref_model.get_parameter(name).data.copy_(tensor)

    # --- the ready batch ----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """The next groups as a batch; what happens between batches happens in here, while it waits for them."""
        rows = self.source.next_rows()
        self.count, self.tokens = len(rows), sum(row.tokens for row in rows)
        batch = tensors(rows, self.padding, self.accelerator.device)
        found = sizes(rows)
        learned = self.running_rows(rows)
        if learned and self.shares is None:
            self.shares = self.can_share(select(batch, [*learned[:2]]))
        self.parts, self.running = self.cut(found, learned), len(learned)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.policy, checkpointing):
            self.add_old(batch)
            if self.beta != 0.0:
                batch["ref_per_token_logps"] = self.reference(batch)
        return batch

    def running_rows(self, rows: Sequence[Row]) -> list[int]:
        """The numbers of those that run through the model; none where no row teaches anything. Entropies and the load
        of experts alone are no reason for a step."""
        teaching = any(row.tokens > 0 and (row.advantage != 0 or self.beta != 0.0) for row in rows)
        if not teaching and self.run.config.training_version > 1:
            return []
        return [number for number, row in enumerate(rows) if self.matters(row)]

    def matters(self, row: Row) -> bool:
        """Whether the row can move a weight. Others count in the normaliser and do not run through the model."""
        flat = (
            row.advantage == 0 and self.beta == 0.0 and self.top_entropy_quantile == 1.0 and not self.aux_loss_enabled
        )
        return row.tokens > 0 and not flat

    def cut(self, found: Sizes, learned: list[int]) -> list[RowNumbers]:
        """This rank's micro-batches, by row numbers; every rank has as many, of as many rows."""
        most = self.run.config.micro_batch_size
        most_rows, share = None if most == "auto" else most, self.run.micro_batch_share
        if not learned:
            # of version 1, a loss of 0: the optimizer's step is that of a zero gradient
            return [[None]] if self.run.config.training_version == 1 else []
        if self.run.world_size == 1:
            parts = cut(found.take(learned), self.limits, most_rows, shared=bool(self.shares), share=share)
            return [[learned[i] for i in rows] for rows in parts]
        hands = deal(learned, found, self.run.world_size)
        mine = hands[self.run.rank]
        parts = cut(longest_of(hands, found), self.limits, most_rows, shared=False, share=share)
        return [[mine[i] for i in rows] for rows in parts]

    def add_old(self, batch: Batch) -> None:
        """What the ratio divides by. Absent, TRL takes the policy's own of this moment without its gradient."""
        config = self.run.config
        sampling_BC = batch.get("sampling_per_token_logps")
        if config.ratio == "sampler" and sampling_BC is not None:
            unknown_BC = sampling_BC.isnan()
            if unknown_BC.any():
                sampling_BC = torch.where(unknown_BC, self.over_parts(batch, self.model)[0], sampling_BC)
            batch["old_per_token_logps"] = sampling_BC
        elif self.num_iterations > 1 or config.importance_sampling_mode:
            batch["old_per_token_logps"] = self.over_parts(batch, self.model)[0]
        if config.importance_sampling_mode:
            batch["importance_sampling_ratio"] = sampling_correction(batch, config)

    def reference(self, batch: Batch) -> Tensor:
        """Log-probabilities of the reference, B x C: a model of its own, the adapter that training began with, or the
        base model."""
        if self.ref_model is not None:
            return self.over_parts(batch, self.ref_model)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.over_parts(batch, self.model)[0]

    def over_parts(self, batch: Batch, model: Any, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of this rank's rows, B x C; 0 elsewhere."""
        shape = batch["completion_ids"].shape
        logps_BC, entropies_BC = (torch.zeros(shape, device=batch["advantages"].device) for _ in range(2))
        for rows in self.parts:
            ids_BT, mask_BT, length = sequences(select(batch, rows))
            found_BC, spread_BC, _ = self._get_per_token_logps_and_entropies(
                model, ids_BT, mask_BT, length, compute_entropy=entropy
            )
            real = [(place, row) for place, row in enumerate(rows) if row is not None]
            places, numbers = ([pair[i] for pair in real] for i in range(2))
            logps_BC[numbers, :length] = found_BC[places].float()
            if spread_BC is not None:
                entropies_BC[numbers, :length] = spread_BC[places].float()
        return logps_BC, entropies_BC

    # --- one optimizer step -------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The gradient of the whole batch, micro-batch by micro-batch; returns the batch's loss. There is none where no
        row teaches anything."""
        model.train()
        if self._step % self.num_iterations == 0:
            self.batch = self._generate_and_score_completions(inputs)
        self.batch_ready_at = time.perf_counter()
        self._step += 1
        if not self.parts:
            return torch.zeros((), device=self.accelerator.device)
        if self.top_entropy_quantile < 1.0:
            self.batch["entropy_mask"] = self.highest_entropies()
        step_metrics = metrics.StepMetrics(self._metrics["train"], self.importance_sampling_level)
        loss = torch.zeros((), device=self.accelerator.device)
        for number, rows in enumerate(self.parts):
            loss += self.micro_step(model, rows, step_metrics, last=number == len(self.parts) - 1)
        step_metrics.combine(self.accelerator)
        return loss

    def micro_step(self, model: Any, rows: RowNumbers, step_metrics: metrics.StepMetrics, *, last: bool) -> Tensor:
        """The gradient of a micro-batch, added to the step's; its weighted loss."""
        self.micro = select(self.batch, rows)
        self.accelerator.gradient_state._set_sync_gradients(last)
        together = last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with nullcontext() if together else self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self.micro)
            loss = loss * weight(self.loss_type, self.micro, self.count, self.tokens, self.run.world_size)
            if self.aux is not None:
                loss = loss + self.aux_coefficient * share_of_rows(rows, self.running, self.run.world_size) * self.aux
            options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
            self.accelerator.backward(loss, **options)
        step_metrics.add(self.micro, self.logps_BC)
        return torch.as_tensor(loss.detach())

    def highest_entropies(self) -> Tensor:
        """Which tokens of the batch are learned with `top_entropy_quantile`: B x C. Of a micro-batch alone, the
        threshold would be another."""
        mine_BC = torch.zeros_like(self.batch["tool_mask"])
        mine_BC[[row for rows in self.parts for row in rows if row is not None]] = 1
        mask_BC = learned_mask(self.batch) * mine_BC
        with torch.no_grad():
            _, entropies_BC = self.over_parts(self.batch, self.model, entropy=True)
        return torch.as_tensor(super().get_high_entropy_mask(entropies_BC, mask_BC, 1 - self.top_entropy_quantile))

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """The micro-batch's part of `highest_entropies`."""
        del entropies, mask, threshold  # they were looked at for the whole batch
        return self.micro["entropy_mask"]
