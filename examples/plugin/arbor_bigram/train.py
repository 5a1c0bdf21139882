"""The training function. Only a worker imports this file: torch and the like would go here."""

import json
import math
from collections import Counter
from itertools import pairwise

from arbor_core import FileRun, JobStopped, read_rows

from . import BigramConfig


def train(run: FileRun[BigramConfig]) -> None:
    rows = [row["messages"][-1]["content"] for _, row in read_rows(run.training_file)]
    size = run.config.batch_size
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    last = run.last_checkpoint()  # there is one after a pause or a crash
    counts = Counter(json.loads((last.dir / "counts.json").read_text()) if last else {})
    for step in range(last.step + 1 if last else 1, len(batches) + 1):
        pairs = ["".join(pair) for text in batches[step - 1] for pair in pairwise(f"^{text}$")]
        run.metrics(step, len(batches), train_loss=loss(pairs, counts, run.config.smoothing))
        counts.update(pairs)
        try:
            run.stop_if_asked()
        except JobStopped:
            save(run, step, counts)
            raise
    save(run, len(batches), counts)
    run.finish(run.last_checkpoint(), trained_tokens=sum(counts.values()))


def loss(pairs: list[str], counts: Counter[str], smoothing: float) -> float:
    """Mean negative log-likelihood of the second letter given the first, before these pairs are counted."""
    first = Counter()
    for pair, count in counts.items():
        first[pair[0]] += count
    probabilities = [(counts[pair] + smoothing) / (first[pair[0]] + 256 * smoothing) for pair in pairs]
    return -sum(map(math.log, probabilities)) / len(probabilities)


def save(run: FileRun[BigramConfig], step: int, counts: Counter[str]) -> None:
    with run.checkpoint(step) as folder:
        (folder / "counts.json").write_text(json.dumps(counts))
