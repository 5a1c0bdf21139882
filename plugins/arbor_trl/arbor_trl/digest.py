"""What stands for the trained parameters, to compare a run that was interrupted or repeated with one that was not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from xxhash import xxh3_128

MOST_PARAMETERS = 50_000_000
"""More trained parameters are not hashed after each step: 0.2 GB, some 20 ms, and as much to bring them from a GPU."""


def digest(parameters: Iterable[torch.nn.Parameter]) -> str | None:
    """XXH3-128 of those that are trained, in hexadecimal; None where computing it would be felt."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained or sum(parameter.numel() for parameter in trained) > MOST_PARAMETERS:
        return None
    if any(type(one) is not torch.nn.Parameter or hasattr(one, "ds_id") for one in trained):
        return None  # sharded by FSDP or DeepSpeed: each rank has a part
    found = xxh3_128()
    for parameter in trained:
        found.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
