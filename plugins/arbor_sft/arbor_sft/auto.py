"""What stands for "auto". Pure functions of the row count, so that they can be explained and tested."""

from __future__ import annotations

from . import SftConfig

EPOCHS = 3
FEWEST_SEEN, MOST_SEEN = 100, 25_000
"""Rows seen over all epochs: fewer teach little, more are seldom needed."""
BATCH_SHARE = 0.002
ADAPTER_RATE, FULL_RATE = 2e-4, 2e-5


def n_epochs(config: SftConfig, rows: int) -> int:
    """Passes over the data, as OpenAI's cookbook estimates them: 3, bounded by the rows seen in all."""
    if config.n_epochs != "auto":
        return config.n_epochs
    if rows * EPOCHS < FEWEST_SEEN:
        return min(25, -(-FEWEST_SEEN // rows))
    return max(1, min(EPOCHS, MOST_SEEN // rows))


def batch_size(config: SftConfig, rows: int) -> int:
    """Rows per optimizer step: 0.2 % of the rows, 1 to 256."""
    if config.batch_size != "auto":
        return config.batch_size
    return max(1, min(256, round(rows * BATCH_SHARE)))


def multiplier(config: SftConfig) -> float:
    return 1.0 if config.learning_rate_multiplier == "auto" else config.learning_rate_multiplier


def learning_rate(config: SftConfig) -> float:
    """The highest rate, multiplied."""
    base = (ADAPTER_RATE if config.lora else FULL_RATE) if config.learning_rate == "auto" else config.learning_rate
    return base * multiplier(config)
