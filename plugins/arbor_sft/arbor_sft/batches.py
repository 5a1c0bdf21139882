"""Micro-batches as tensors, and whether a model tells the rows of a packed one apart.

Shape suffixes: B, rows; L, tokens of the longest row; T, tokens of all rows; V, vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from arbor_trl.chat import IGNORED, Sample
from torch import Tensor
from transformers import PreTrainedModel

PROBE_TOKENS = 64


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
        ids_BL, labels_BL = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        mask_BL = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            length = len(sample.ids)
            ids_BL[row, :length] = torch.tensor(sample.ids)
            labels_BL[row, :length] = torch.tensor(sample.labels)
            mask_BL[row, :length] = 1
        return {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}

    def one_sequence(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {
            "input_ids": torch.tensor([[token for sample in samples for token in sample.ids]]),
            "position_ids": torch.tensor([[at for sample in samples for at in range(len(sample.ids))]]),
            "labels": torch.tensor([[label for sample in samples for label in sample.labels]]),
        }


@torch.no_grad()
def tells_rows_apart(model: PreTrainedModel, samples: Sequence[Sample]) -> bool:
    """Whether two rows in one sequence give the logits that they give alone. Tried, because no flag says so."""
    two = [sample.cut(PROBE_TOKENS) for sample in samples[:2]] * (2 if len(samples) == 1 else 1)
    model.train(False)

    def logits(rows: Sequence[Sample]) -> Tensor:
        inputs = Collate(rows, 0).one_sequence(rows)
        ids_1T, positions_1T = (inputs[key].to(model.device) for key in ("input_ids", "position_ids"))
        logits_TV: Tensor = model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).logits[0].float()
        return logits_TV

    alone_TV, together_TV = torch.cat([logits([row]) for row in two]), logits(two)
    model.train()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((alone_TV - together_TV).abs().max() <= tolerance * alone_TV.abs().max())
