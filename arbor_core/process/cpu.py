"""Vector instructions: sums have other last bits with AVX-512 than with AVX2, so a job keeps to those it began with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

WIDEST_FIRST = ("avx512f", "avx2")
HOLD_TO = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""Variables that hold PyTorch, oneDNN and MKL to an instruction set. They are read once, when the libraries are first
used. MKL_CBWR is not among them: its reproducible AVX2 is not what MKL uses by itself where there is nothing wider."""


def instruction_set(env: Mapping[str, str] | None = None) -> str:
    """The widest vector instructions that PyTorch would use here, in an environment (default: this process's)."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return os.uname().machine
    here = next((name for name in WIDEST_FIRST if name in flags), os.uname().machine)
    held = (os.environ if env is None else env).get("ATEN_CPU_CAPABILITY")
    return held if held in HOLD_TO and wider(here, held) else here


def holding(made: str, here: str) -> dict[str, str]:
    """Variables with which a process computes as where a job was made; none where it does anyway, or cannot."""
    return HOLD_TO[made] if made in HOLD_TO and wider(here, made) else {}


def wider(one: str, other: str) -> bool:
    known = one in WIDEST_FIRST and other in WIDEST_FIRST
    return known and WIDEST_FIRST.index(one) < WIDEST_FIRST.index(other)
