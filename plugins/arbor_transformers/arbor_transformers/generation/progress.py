"""Whether the generation loop gets on with its work: written by its thread, read by the one that answers /health.

A turn may take minutes, when a large model reads a long prompt on few cores. So the loop beats once a turn, and the
model once a layer: only what moves neither hangs.
"""

import time
from typing import Any

from torch import nn


class Pulse:
    """When the loop last got on. A thread that reads it sees the old value or the new one, never half of it."""

    def __init__(self) -> None:
        self.moved: float | None = None

    def beat(self) -> None:
        """There is work, and it gets on."""
        self.moved = time.monotonic()

    def rest(self) -> None:
        """There is nothing to do."""
        self.moved = None

    @property
    def quiet_seconds(self) -> float:
        """For how long there has been work without a beat."""
        moved = self.moved
        return 0.0 if moved is None else time.monotonic() - moved


def beat_with(model: nn.Module, pulse: Pulse) -> None:
    """Have every layer of a model beat before it runs: what its lists of modules hold."""

    def beat(*_: Any) -> None:
        pulse.beat()

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(beat)
