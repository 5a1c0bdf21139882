"""Whether a job fits in the memory of its devices, and which settings would need less."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def shortfall(model: Path, config: Mapping[str, Any], device: int, *, trains_all: bool) -> str | None:
    """A warning if a device will hardly do: weights are in its memory whole, and to train all of them needs a gradient
    and Adam's two moments for each. Activations come on top.

    Args:
        model: The base model's folder; one that is still to be downloaded is not judged.
        device: Bytes of the smallest device; 0: not known.
        trains_all: It trains all weights, not an adapter.
    """
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors")) if model.is_dir() else 0
    needed = weights * (4 if trains_all else 1)
    if not device or needed <= device:
        return None
    what = "weights, gradients and optimizer" if trains_all else "weights"
    return (
        f"The {what} alone need about {needed / 1e9:.1f} GB, a device here has {device / 1e9:.1f} GB: the job "
        f"will probably run out of memory. If so, {advice(config, trains_all=trains_all)}."
    )


def advice(config: Mapping[str, Any], *, trains_all: bool) -> str:
    """Which of a job's settings would need less memory."""
    steps = [f"lower {key}" for key in ("micro_batch_size", "max_length") if key in config]
    if config.get("gradient_checkpointing") is False:
        steps.append("turn gradient_checkpointing on")
    if trains_all:
        steps.append("train an adapter (lora)")
    return ", or ".join([*steps, "take a smaller base model"])
