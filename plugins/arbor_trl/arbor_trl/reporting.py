"""What is reported of each step, whatever the method."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from xxhash import xxh3_128

from arbor_core import JobFailed, Run

from .result import withdraw_if_not_finite

MOST_PARAMETERS = 50_000_000
"""More trained parameters are not hashed after each step: 0.2 GB, some 20 ms, and as much to bring them from a GPU."""


class StepReporter(TrainerCallback):
    """Passes on the numbers of each step; a loss that is not finite ends the job."""

    run: Run[Any]

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
            if self.run.rank == 0:
                withdraw_if_not_finite(self.run)
            raise JobFailed(
                f"the loss became {logs['loss']} at step {state.global_step}: lower the learning rate",
                code="training_diverged",
            )
        self.report(state, control, logs)

    @abstractmethod
    def report(self, state: TrainerState, control: TrainerControl, logs: Mapping[str, float]) -> None:
        """Report a step; `logs` are TRL's numbers of it."""


def digest_of(trainer: Any) -> str | None:
    """The digest of what a trainer trains; see `digest`."""
    return digest(trainer.accelerator.unwrap_model(trainer.model).parameters())


def digest(parameters: Iterable[torch.nn.Parameter]) -> str | None:
    """XXH3-128 of those that are trained, in hexadecimal, to compare a run that was interrupted or repeated with one
    that was not; None where computing it would take too long."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained or sum(parameter.numel() for parameter in trained) > MOST_PARAMETERS:
        return None
    if any(type(one) is not torch.nn.Parameter or hasattr(one, "ds_id") for one in trained):
        return None  # sharded by FSDP or DeepSpeed: each rank has a part
    found = xxh3_128()
    for parameter in trained:
        found.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
