"""Micro-batches as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from arbor_trl.chat import IGNORED, Sample
from torch import Tensor


@dataclass(frozen=True)
class Collate:
    """Turns one item of the plan's data set, `{"rows": [...]}`, into a model's inputs.

    Padded, B rows of up to L tokens: `input_ids`, `attention_mask`, `labels`, each B x L. Packed: `input_ids`,
    `position_ids` (from 0 in each row), `labels`, each 1 x T. An empty micro-batch becomes two tokens without loss.
    """

    samples: Sequence[Sample]
    pad: int
    packed: bool = False

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        samples = [self.samples[row] for item in items for row in item["rows"]]
        samples = samples or [Sample([self.pad] * 2, [IGNORED] * 2)]
        return self.one_sequence(samples) if self.packed else self.padded(samples)

    def padded(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        shape = len(samples), max(len(sample.ids) for sample in samples)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            length = len(sample.ids)
            ids[row, :length] = torch.tensor(sample.ids)
            labels[row, :length] = torch.tensor(sample.labels)
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def one_sequence(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {
            "input_ids": torch.tensor([[token for sample in samples for token in sample.ids]]),
            "position_ids": torch.tensor([[at for sample in samples for at in range(len(sample.ids))]]),
            "labels": torch.tensor([[label for sample in samples for label in sample.labels]]),
        }
