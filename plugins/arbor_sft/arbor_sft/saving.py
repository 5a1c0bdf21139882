"""TRL's trainer, saving where the run says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from arbor_trl.saving import Saving
from trl.trainer.sft_trainer import SFTTrainer

from arbor_core import Run

from . import SftConfig


class SavingTrainer(Saving, SFTTrainer):
    """Args:
    numbers: The metrics of the step that is saved.
    options: `SFTTrainer`'s.
    """

    def __init__(self, run: Run[SftConfig], numbers: Callable[[], dict[str, float]], **options: Any) -> None:
        super().__init__(**options)
        self.run, self._numbers = run, numbers

    def numbers(self) -> Mapping[str, float]:
        return self._numbers()
