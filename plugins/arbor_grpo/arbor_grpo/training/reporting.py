"""Metrics of each step, and the policy published after it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from arbor_trl.reporting import StepReporter, digest_of
from transformers import TrainerControl, TrainerState, TrainingArguments

from arbor_core import RolloutRun
from arbor_grpo import GrpoConfig

from .session import Session

LEFT_OUT = ("loss", "epoch", "num_tokens", "step_time")
"""TRL's metrics that are ours under another name, or that count something else here."""


class Reporting(StepReporter):
    """Order within a step is transformers': on_optimizer_step, on_step_end (publish), on_log (report)."""

    run: RolloutRun[GrpoConfig]

    def __init__(self, run: RolloutRun[GrpoConfig], session: Session) -> None:
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
        self.session.measured["train_time"] = time.perf_counter() - self.session.trainer.batch_ready_at

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.session.after_step()

    def report(self, state: TrainerState, control: TrainerControl, logs: Mapping[str, float]) -> None:
        now = time.perf_counter()
        found = {name: value for name, value in logs.items() if name not in LEFT_OUT and value is not None}
        self.session.reported = {
            "train_loss": logs["loss"],
            **self.session.measured,
            **{name: value for name, value in found.items() if math.isfinite(value)},
            "step_time": now - self.began,
        }
        self.began = now
        total = self.run.config.max_steps or state.global_step
        digest = digest_of(self.session.trainer)
        self.session.report_samples()
        self.run.metrics(state.global_step, total, digest, self.session.inputs, **self.session.reported)
        state.log_history.clear()  # the events hold it; a run without end would write it into each checkpoint
