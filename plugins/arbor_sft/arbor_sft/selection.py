"""Which checkpoint is the best by validation loss, and when training ends because nothing gets better."""

from __future__ import annotations

import math

import msgspec

FILE = "selection.json"
"""File in a checkpoint: what was found until then."""
BEST = "best"
"""Name of the best checkpoint."""


class Selection(msgspec.Struct):
    """What the evaluations of a job have found so far."""

    lowest: float | None = None
    """Validation loss, of all evaluations."""
    in_vain: int = 0
    """Evaluations since then."""
    best: float | None = None
    """Validation loss, of those checkpoints that are there."""
    best_step: int = 0

    def is_lower(self, loss: float) -> bool:
        """Whether a validation loss is below all others. One that is no finite number never is."""
        return math.isfinite(loss) and (self.lowest is None or loss < self.lowest)

    def note(self, step: int, loss: float, *, saved: bool) -> None:
        """An evaluation after a step; `saved`: of which there is a checkpoint. Of equal ones the first is the best."""
        if self.is_lower(loss):
            self.lowest, self.in_vain = loss, 0
        else:
            self.in_vain += 1
        if saved and math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best, self.best_step = loss, step

    def ends(self, patience: int | None) -> bool:
        """Whether training is to end."""
        return patience is not None and self.in_vain >= patience

    def result(self, last: int, patience: int | None) -> int:
        """The step whose checkpoint is the job's result: the best for those who watch the validation loss, else the
        last."""
        return self.best_step if patience and self.best is not None else last
