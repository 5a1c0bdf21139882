"""The CPU's vector instructions.

With AVX-512 sums have other last bits than with AVX2, so all attempts of a job use the instructions of the first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

WIDEST_FIRST = ("avx512f", "avx2")
LIMIT_TO = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""Environment variables that limit PyTorch, oneDNN and MKL to an instruction set. They are read once, when the
libraries are first used. MKL_CBWR is not among them: its reproducible AVX2 is not what MKL uses by itself on a CPU with
AVX2 only."""


def instruction_set(env: Mapping[str, str] | None = None) -> str:
    """The widest vector instructions that PyTorch would use on this machine; its architecture if they are not known.

    Args:
        env: The environment that PyTorch would have; default: this process's.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return os.uname().machine
    available = next((name for name in WIDEST_FIRST if name in flags), os.uname().machine)
    limit = (os.environ if env is None else env).get("ATEN_CPU_CAPABILITY")
    return limit if limit in LIMIT_TO and is_wider(available, limit) else available


def instruction_set_env(recorded: str, available: str) -> dict[str, str]:
    """Environment variables for a process to compute as with the instruction set `recorded` on a machine that has
    `available`; empty where it does without them, or cannot."""
    return LIMIT_TO[recorded] if recorded in LIMIT_TO and is_wider(available, recorded) else {}


def is_wider(one: str, other: str) -> bool:
    """Whether `one` is wider than `other`; False if either is unknown."""
    known = one in WIDEST_FIRST and other in WIDEST_FIRST
    return known and WIDEST_FIRST.index(one) < WIDEST_FIRST.index(other)
