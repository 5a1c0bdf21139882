"""A learning curve from a job's result file: what demo.py writes to demo-out/learning.png."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

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


def column(table: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column, where there is a value."""
    with table.open(newline="") as file:
        pairs = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]
    return [step for step, _ in pairs], [value for _, value in pairs]
