"""Running out of memory: how libraries say so, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CODE = "out_of_memory"
"""The error's code, and the name of the file in which a rank leaves word."""
SHARE = 0.5
"""How large micro-batches are after that, in parts of what they were."""
SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")
"""In the words of CUDA, of PyTorch's allocator on a CPU, of the operating system, and of cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether too little memory, a device's or the machine's, is behind an error. PyTorch's allocator has a type for it
    on a GPU and only words on a CPU."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or "OutOfMemory" in type(seen).__name__:
            return True
        if isinstance(seen, RuntimeError | OSError) and any(words in str(seen).lower() for words in SAID):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def leave_word(attempt_dir: Path, message: str) -> None:
    """Say what happened in a rank that reports nothing. What the first rank says then only follows from it."""
    (attempt_dir / CODE).write_text(message)


def left_word(attempt_dir: Path) -> str | None:
    """What a rank said that ran out of memory, if one did."""
    path = attempt_dir / CODE
    return path.read_text() if path.exists() else None


def shortfall(model: Path, config: Mapping[str, Any], device: int) -> str | None:
    """A warning if a device will hardly do: weights are in its memory whole, and to train all of them needs a gradient
    and Adam's two moments for each. Activations come on top.

    Args:
        model: The base model's folder; one that is still to be downloaded is not judged.
        device: Bytes of the smallest device; 0: not known.
    """
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors")) if model.is_dir() else 0
    every = "lora" in config and config["lora"] is None
    needed = weights * (4 if every else 1)
    if not device or needed <= device:
        return None
    what = "weights, gradients and optimizer" if every else "weights"
    return (
        f"The {what} alone need about {needed / 1e9:.1f} GB, a device here has {device / 1e9:.1f} GB: the job "
        f"will probably run out of memory. If so, {advice(config)}."
    )


def advice(config: Mapping[str, Any]) -> str:
    """Which of a job's settings would need less memory."""
    steps = [f"lower {key}" for key in ("micro_batch_size", "max_length") if key in config]
    if config.get("gradient_checkpointing") is False:
        steps.append("turn gradient_checkpointing on")
    if "lora" in config and config["lora"] is None:
        steps.append("train an adapter (lora)")
    return ", or ".join([*steps, "take a smaller base model"])
