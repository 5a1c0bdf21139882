"""What happens between steps: metrics, evaluation, checkpoints, pausing and cancelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from arbor_trl.chat import Sample
from arbor_trl.job import agreed, agreed_stop
from arbor_trl.probes import answer_probes
from arbor_trl.reporting import StepReporter, digest_of
from arbor_trl.saving import CheckpointMixin
from arbor_trl.steps import ScheduleMixin
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from arbor_core import Checkpoint, FileRun, JobStopped

from . import SftConfig
from .plan import Plan, Rows
from .selection import BEST, FILE, Selection

Collated = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]


class RunTrainer(CheckpointMixin, ScheduleMixin, SFTTrainer):
    """TRL's trainer, whose checkpoints are the run's, and whose rates are Arbor's.

    Args:
        reporting: Knows what belongs to the step that is saved.
        options: `SFTTrainer`'s.
    """

    def __init__(self, run: FileRun[SftConfig], reporting: Reporting, **options: Any) -> None:
        super().__init__(**options)
        self.run, self.reporting = run, reporting

    def checkpoint_metrics(self) -> Mapping[str, float]:
        return self.reporting.metrics

    def checkpoint_files(self) -> Mapping[str, bytes]:
        return {FILE: msgspec.json.encode(self.reporting.selection)} if self.reporting.evaluation else {}

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """Report the step, and save what it leaves; in this order, because an attempt that goes on after it does not
        report it again. transformers calls it at the end of an epoch too."""
        super()._maybe_log_save_evaluate(*args, **options)
        saved = self.saved_step == self.state.global_step
        if not saved and agreed(self.resume_clock.is_due(), self.run, self.accelerator):
            self.save_resume_point()


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

    run: FileRun[SftConfig]

    def __init__(
        self, run: FileRun[SftConfig], plan: Plan, samples: Sequence[Sample], evaluation: Evaluation | None
    ) -> None:
        self.run, self.plan, self.samples, self.evaluation = run, plan, samples, evaluation
        self.total = len(plan.steps)
        self.trainer: SFTTrainer | None = None
        self.metrics: dict[str, float] = {}
        self.valid: dict[str, float] = {}
        self.stop: JobStopped | None = None
        self.selection = Selection()
        self.probed = -1
        """The step whose policy has answered the probes."""
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
            self.select(step, self.valid["valid_loss"], control)
        return control

    def select(self, step: int, loss: float, control: TrainerControl) -> None:
        """Note an evaluation. With patience the best policy is to be the result, so it is saved. Training ends where
        one evaluation too many was in vain."""
        patience = self.run.config.early_stopping_patience
        due = self.checkpoint_due(step) or (patience is not None and self.selection.is_lower(loss))
        control.should_save |= due
        self.selection.note(step, loss, saved=due)
        if step < self.total and self.selection.ends(patience):
            self.run.message(
                f"Training ends after step {step}: {patience} evaluations in a row found no validation loss below "
                f"{self.selection.lowest:.4g}"
            )
            control.should_save = control.should_training_stop = True

    def resume(self, last: Checkpoint) -> None:
        """Go on after a checkpoint."""
        path = last.dir / FILE
        if path.is_file():
            self.selection = msgspec.json.decode(path.read_bytes(), type=Selection)
        best = self.selection.best_step
        if best and self.run.checkpoint_of(best) is None:
            self.run.message(f"The best checkpoint so far, that of step {best}, is damaged: the next one is it", "warn")
            self.selection.best, self.selection.best_step = None, 0
        self.name_best(best)  # the attempt before may not have come to it, or have named one that is damaged

    def name_best(self, step: int) -> None:
        """Give the checkpoint of this step its name, if it is the best so far."""
        if self.run.rank == 0 and self.selection.best is not None and self.selection.best_step == step:
            self.run.give_name(BEST, step, {"valid_loss": self.selection.best})
            if self.trainer and self.trainer.state.global_step == step:  # not when an attempt catches up with the name
                self.answer_probes(BEST, step)

    def result(self, last: int) -> int:
        """The step whose checkpoint is the job's result, when the last step is made. Its policy answers the probes, if
        it has not done so as the best one."""
        patience = self.run.config.early_stopping_patience
        step = self.selection.result(last, patience)
        if patience and self.selection.best is None:
            self.run.message("No evaluation found a finite validation loss: the last checkpoint is the result", "warn")
        elif patience:
            self.run.message(
                f"The result is the checkpoint of step {step}, whose validation loss of {self.selection.best:.4g} is "
                "the lowest"
            )
        if self.trainer and self.trainer.state.global_step == step:  # not when an attempt only catches up
            self.answer_probes("result", step)
        return step

    def answer_probes(self, name: str, step: int) -> None:
        """Have the present policy answer the job's probes, as the checkpoint of this name."""
        if self.trainer and self.run.rank == 0 and self.probed != step:
            self.probed = step
            answer_probes(self.run, self.trainer, name, step)

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
        self.name_best(state.global_step)
        if self.run.rank == 0 and self.run.config.keep_checkpoints:
            self.run.keep_checkpoints(self.run.config.keep_checkpoints)
        if self.stop:
            raise self.stop
