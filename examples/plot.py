"""Learning curves: what demo.py and demo_grpo.py write to demo-out/."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed

from matplotlib import pyplot as plt


def draw(table: Path, scores: Mapping[int, float], out: Path) -> None:
    """Draw loss above and accuracy below, over the steps.

    Args:
        table: The result file (CSV, one row a step; columns that were not measured at a step are empty).
        scores: Exact match on held-out examples, by the step after which it was measured.
        out: PNG to write.
    """
    figure, (losses, accuracies) = plt.subplots(2, 1, sharex=True, figsize=(8, 7), layout="constrained")
    losses.plot(*column(table, "train_loss"), color="0.6", linewidth=1, label="training")
    losses.plot(*column(table, "valid_loss"), "o-", markersize=4, color="tab:blue", label="validation")
    losses.set(ylabel="loss (nats per token)", ylim=(0, None), title="Reversing words that were never seen")
    steps, accuracy = column(table, "valid_mean_token_accuracy")
    accuracies.plot(steps, accuracy, "o-", markersize=4, color="tab:blue", label="validation, per token")
    points = sorted(scores.items())
    accuracies.plot(*zip(*points, strict=True), "s-", color="tab:red", label="held-out words, exact match")
    for step, score in points:
        above = (0, 8 if score < 0.9 else -16)
        accuracies.annotate(f"{score:.2f}", (step, score), above, textcoords="offset points", ha="center")
    accuracies.set(xlabel="step", ylabel="accuracy", ylim=(-0.05, 1.05))
    for axes in (losses, accuracies):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_rewards(steps: Sequence[Mapping[str, Any]], scores: Mapping[int, float], out: Path) -> None:
    """Draw reward and accuracy, staleness, and where a step's time goes, one above the other.

    Args:
        steps: Metrics of each step, as the job's events report them.
        scores: Exact match on held-out examples, by the step after which it was measured.
        out: PNG to write.
    """
    figure, (learning, staleness, times) = plt.subplots(3, 1, sharex=True, figsize=(8, 9), layout="constrained")
    at = [step["step"] for step in steps]

    def values(name: str) -> list[float]:
        return [step.get(name, 0.0) for step in steps]

    learning.plot(at, values("reward"), color="0.6", linewidth=1, label="reward, mean of the step")
    learning.plot(
        *zip(*sorted(scores.items()), strict=True), "s-", color="tab:red", label="held-out words, exact match"
    )
    learning.set(ylabel="reward, accuracy", ylim=(-0.05, 1.05), title="Reversing words, learned from rewards")
    staleness.plot(at, values("staleness_mean"), color="tab:blue", label="mean")
    staleness.plot(at, values("staleness_max"), color="0.6", linewidth=1, label="greatest")
    staleness.set(ylabel="staleness (batches)", ylim=(-0.1, None))
    parts = [values(name) for name in ("wait_time", "train_time", "publish_time")]
    times.stackplot(at, *parts, labels=["waiting for groups", "training", "publishing"], alpha=0.7)
    times.set(xlabel="step", ylabel="time (s)", ylim=(0, None))
    for axes in (learning, staleness, times):
        axes.legend(loc="lower right" if axes is learning else "upper right")
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def column(table: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column, where there is a value."""
    with table.open(newline="") as file:
        pairs = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]
    return [step for step, _ in pairs], [value for _, value in pairs]
