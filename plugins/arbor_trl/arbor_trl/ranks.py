"""What several ranks must agree on: one that stopped alone would leave the others waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from arbor_core import Desired, JobStopped, Run


@contextmanager
def parting() -> Iterator[None]:
    """Leave the group of ranks when the block ends: its threads must not be running when the interpreter goes."""
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


WORDS: tuple[Desired, ...] = ("run", "pause", "cancel")


def asked_to_stop(run: Run[Any], accelerator: Accelerator | None) -> JobStopped | None:
    """What the run is asked; of what the ranks have read, the strongest word. None: to go on."""
    try:
        run.stop_if_asked()
        stop = None
    except JobStopped as asked:
        stop = asked
    if accelerator is None or run.world_size == 1:
        return stop
    mine = torch.tensor([WORDS.index(stop.desired if stop else "run")], device=accelerator.device)
    word = WORDS[int(accelerator.gather(mine).max())]
    return None if word == "run" else JobStopped(word)
