"""What tests of real models run on."""

from __future__ import annotations

import os

from arbor_core.builtin.allocator import find_gpus
from arbor_core.types import Device

VARIABLE = "ARBOR_TEST_DEVICE"


def device() -> Device:
    """A CPU slot; the first GPU where the environment says `ARBOR_TEST_DEVICE=cuda`.

    Raises:
        AssertionError: the GPU is not there, or the variable says something else.
    """
    wanted = os.environ.get(VARIABLE, "cpu")
    assert wanted in ("cpu", "cuda"), f"{VARIABLE}={wanted}: expected cpu or cuda"
    if wanted == "cpu":
        return Device("cpu:0")
    gpus = find_gpus()
    assert gpus, f"{VARIABLE}=cuda, but the NVIDIA driver shows no GPU"
    return gpus[0]
