"""A short chaos; `make chaos` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("arbor_sft")
from chaos import MOCK, REAL, Chaos

pytestmark = [pytest.mark.ml, pytest.mark.slow, pytest.mark.timeout(400)]


def test_nothing_is_lost(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=5, real=REAL[:1], mock=MOCK[:1], most=4)
    try:
        assert chaos.run(15) == []
    finally:
        chaos.close()
    assert chaos.counts["steps compared"] > 0
    assert sum(count for name, count in chaos.counts.items() if "killed" in name or "SIGKILL" in name) > 0
