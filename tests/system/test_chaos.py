"""A short chaos; `make chaos` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("arbor_sft")
from chaos import MOCK, REAL, Chaos
from chaos_commands import EXECUTING
from chaos_rollouts import LEARNING, LEARNING_REAL

pytestmark = [pytest.mark.chaos, pytest.mark.ml, pytest.mark.slow, pytest.mark.timeout(400)]


def test_nothing_is_lost(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=5, real=REAL[:1], mock=MOCK[:1], live=[], most=4)
    try:
        assert chaos.run(15) == []
    finally:
        chaos.close()
    assert chaos.counts["steps compared"] > 0
    assert sum(count for name, count in chaos.counts.items() if "killed" in name or "SIGKILL" in name) > 0


def test_nothing_of_what_a_job_learns_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("arbor_grpo")
    chaos = Chaos(tmp_path, seed=7, real=[], mock=[], live=LEARNING[:1] + LEARNING_REAL, most=4)
    try:
        assert chaos.run(20) == []
    finally:
        chaos.close()
    assert chaos.counts["groups taken"] > 0
    assert chaos.counts["groups in inboxes"] >= chaos.counts["groups taken"]


def test_no_command_and_no_result_is_lost(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=9, real=[], mock=[], live=EXECUTING, most=4)
    try:
        assert chaos.run(20) == []
    finally:
        chaos.close()
    for done in ("commands taken", "results got", "acknowledgements", "jobs on commands checked"):
        assert chaos.counts[done] > 0, f"no {done}: {chaos.counts}"
