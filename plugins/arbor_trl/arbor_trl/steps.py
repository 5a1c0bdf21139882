"""Optimizer steps, whatever the method: the rate of each, and that one without a gradient changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arbor_core import Run


def rate_share(step: int, *, schedule: str, warmup: int, total: int) -> float:
    """The share of the highest rate with which an optimizer step is made. Never 0: each step learns.

    Args:
        step: Its number, from 0.
        schedule: `constant`, which has no warm-up, `constant_with_warmup`, `linear` or `cosine`.
        warmup: Steps in which the rate rises, from 1 / `warmup` of the highest.
        total: Steps after which the rate has fallen to 0.
    """
    if schedule == "constant":
        return 1.0
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant_with_warmup":
        return 1.0
    left = max(0.0, (total - step) / max(1, total - warmup))
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


class ScheduleMixin:
    """To stand before a trainer of TRL among the bases of a class: its rates are those of `rate_share`.

    transformers' schedules begin at a rate of 0, and the first step, or the only one, is made in vain. Jobs with
    `training_version` 1 go on with them.
    """

    run: Run[Any]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The trainer's schedule, which it keeps."""
        trainer: Any = self
        if self.run.config.training_version == 1:
            found: LRScheduler = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
            return found
        if trainer.lr_scheduler is None:
            warmup = trainer.args.get_warmup_steps(num_training_steps)
            settings = {"schedule": trainer.args.lr_scheduler_type, "warmup": warmup, "total": num_training_steps}
            trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, partial(rate_share, **settings))
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler  # type: ignore[no-any-return]


class IdleSteps(TrainerCallback):
    """Takes away a gradient that is 0 everywhere, before the optimizer sees it: momentum and weight decay would move
    the weights though nothing was learned. The step counts, and its rate goes by."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        if is_zero(parameters):
            for parameter in parameters:
                parameter.grad = None


def is_zero(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether no parameter has a gradient other than 0. Where ranks hold parts of parameters (FSDP, DeepSpeed) none can
    tell for the others: no."""
    for parameter in parameters:
        if type(parameter) is not torch.nn.Parameter or hasattr(parameter, "ds_id"):
            return False
        if parameter.grad is not None and bool(parameter.grad.any()):
            return False
    return True
