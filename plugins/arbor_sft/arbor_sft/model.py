"""What only supervised fine-tuning asks of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from arbor_trl.chat import Sample
from transformers import PreTrainedModel

from .batches import Collate

PROBE_TOKENS = 64


@torch.no_grad()
def tells_rows_apart(model: PreTrainedModel, samples: Sequence[Sample]) -> bool:
    """Whether two rows in one sequence give the logits that they give alone. Tried, because no flag says so."""
    two = [sample.cut(PROBE_TOKENS) for sample in samples[:2]] * (2 if len(samples) == 1 else 1)
    model.train(False)

    def logits(rows: Sequence[Sample]) -> torch.Tensor:
        inputs = Collate(rows, 0).one_sequence(rows)
        ids, positions = (inputs[key].to(model.device) for key in ("input_ids", "position_ids"))
        found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        return found

    alone, together = torch.cat([logits([row]) for row in two]), logits(two)
    model.train()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((alone - together).abs().max() <= tolerance * alone.abs().max())
