"""Metrics of each step, and the policy published after it."""

from __future__ import annotations

import math
import time
from typing import Any

from arbor_trl.digest import digest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arbor_core import JobFailed, Run
from arbor_grpo import GrpoConfig

from .session import Session

NOT_TOLD = ("loss", "epoch", "num_tokens", "step_time")


class Reporting(TrainerCallback):
    """Order within a step is transformers': on_optimizer_step, on_step_end (publish), on_log (report)."""

    def __init__(self, run: Run[GrpoConfig], session: Session) -> None:
        self.run, self.session = run, session
        self.began = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an engine may not have: the adapter that training begins with, or goes on from."""
        if self.run.adapter or state.global_step:
            self.session.publish()
        self.began = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.session.measured["train_time"] = time.perf_counter() - self.session.began

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.session.after_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the summary after the last step
            return
        if not math.isfinite(logs["loss"]):
            raise JobFailed(
                f"the loss became {logs['loss']} at step {state.global_step}: lower the learning rate",
                code="training_diverged",
            )
        now = time.perf_counter()
        found = {name: value for name, value in logs.items() if name not in NOT_TOLD and value is not None}
        self.session.reported = {
            "train_loss": logs["loss"],
            **self.session.measured,
            **{name: value for name, value in found.items() if math.isfinite(value)},
            "step_time": now - self.began,
        }
        self.began = now
        trainer = self.session.trainer
        marked = digest(trainer.accelerator.unwrap_model(trainer.model).parameters()) if trainer else None
        total = self.run.config.max_steps or state.global_step
        self.run.metrics(state.global_step, total, marked, self.session.fed, **self.session.reported)
        state.log_history.clear()  # the events hold it; a run without end would write it into each checkpoint
