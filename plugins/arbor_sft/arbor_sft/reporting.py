"""What happens between steps: metrics, evaluation, checkpoints, pausing and cancelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from arbor_trl.chat import Sample
from arbor_trl.job import agreed_stop
from arbor_trl.reporting import StepReporter, digest_of
from arbor_trl.saving import CheckpointMixin
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from arbor_core import FileRun, JobStopped

from . import SftConfig
from .plan import Plan, Rows

Collated = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]


class RunTrainer(CheckpointMixin, SFTTrainer):
    """TRL's trainer, whose checkpoints are the run's.

    Args:
        metrics: Those of the step that is saved.
        options: `SFTTrainer`'s.
    """

    def __init__(self, run: FileRun[SftConfig], metrics: Callable[[], Mapping[str, float]], **options: Any) -> None:
        super().__init__(**options)
        self.run, self._checkpoint_metrics = run, metrics

    def checkpoint_metrics(self) -> Mapping[str, float]:
        return self._checkpoint_metrics()


class Evaluation:
    """Loss and accuracy per token on the validation file, all of it."""

    def __init__(self, micro_batches: Sequence[Rows], collate: Collated) -> None:
        self.micro_batches, self.collate = micro_batches, collate

    def __call__(self, trainer: SFTTrainer) -> dict[str, float]:
        """`valid_loss` (nats per token) and `valid_mean_token_accuracy`. Draws no random number."""
        accelerator, model = trainer.accelerator, trainer.model_wrapped
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        ranks = accelerator.num_processes
        # every rank calls the model equally often, because calls of a distributed model are collective
        shared = [*self.micro_batches, *([] for _ in range(-len(self.micro_batches) % ranks))]
        mine: list[Rows] = shared[accelerator.process_index :: ranks]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for rows in mine:
                inputs = {key: value.to(accelerator.device) for key, value in self.collate([{"rows": rows}]).items()}
                out = model(**inputs, use_cache=False, fused_lm_head=True)
                sums += torch.stack([-out.log_probs.double().sum(), out.is_top1.sum(), out.label_mask.sum()])
        model.train()
        loss, correct, tokens = accelerator.reduce(sums, "sum").tolist()
        return {"valid_loss": loss / tokens, "valid_mean_token_accuracy": correct / tokens}


class Reporting(StepReporter):
    """Connects TRL's trainer with the run.

    Order within a step is transformers': on_step_end (whether to stop, evaluate), on_log (report), then the
    trainer saves (see `CheckpointMixin`), on_save.
    """

    def __init__(
        self, run: FileRun[SftConfig], plan: Plan, samples: Sequence[Sample], evaluation: Evaluation | None
    ) -> None:
        self.run, self.plan, self.samples, self.evaluation = run, plan, samples, evaluation
        self.total = len(plan.steps)
        self.trainer: SFTTrainer | None = None
        self.metrics: dict[str, float] = {}
        self.valid: dict[str, float] = {}
        self.stop: JobStopped | None = None
        self.accuracy = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step
        self.stop = agreed_stop(self.run, self.trainer.accelerator if self.trainer else None)
        if self.stop and self.stop.desired != "pause":
            raise self.stop
        control.should_save = self.stop is not None or self.checkpoint_due(step)
        self.accuracy = self.token_accuracy(step)
        self.valid = {}
        if self.evaluation and self.trainer and (self.checkpoint_due(step) or self.evaluation_due(step)):
            self.valid = self.evaluation(self.trainer)
        return control

    def checkpoint_due(self, step: int) -> bool:
        every = self.run.config.checkpoint_steps
        return step == self.total or (step % every == 0 if every else step in self.plan.epoch_ends)

    def evaluation_due(self, step: int) -> bool:
        every = self.run.config.eval_steps
        return bool(every) and step % int(every or 1) == 0

    def token_accuracy(self, step: int) -> float:
        """Share of the step's learned tokens that were the likeliest. TRL reports the mean over micro-batches; weighted
        by their tokens it is the mean over the step."""
        means: list[float] = self.trainer._metrics["train"]["mean_token_accuracy"] if self.trainer else []
        parts, ranks = self.plan.steps[step - 1], self.run.world_size
        groups = [parts[at : at + ranks] for at in range(0, len(parts), ranks)]
        tokens = [sum(self.samples[row].trained for rows in group for row in rows) for group in groups]
        return sum(mean * count for mean, count in zip(means, tokens, strict=True)) / max(1, sum(tokens))

    def report(self, state: TrainerState, control: TrainerControl, logs: Mapping[str, float]) -> None:
        self.metrics = {
            "train_loss": logs["loss"],
            "train_mean_token_accuracy": self.accuracy,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm", 0.0),
            **self.valid,
        }
        if self.valid and control.should_save:
            self.metrics |= {f"full_{name}": value for name, value in self.valid.items()}
        digest = digest_of(self.trainer) if self.trainer else None
        self.run.metrics(state.global_step, self.total, digest, **self.metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run.rank == 0 and self.run.config.keep_checkpoints:
            self.run.keep_checkpoints(self.run.config.keep_checkpoints)
        if self.stop:
            raise self.stop
