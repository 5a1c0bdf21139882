"""Fixtures: one tiny model for the whole session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from arbor_sft.tiny import make

sys.path.insert(0, str(Path(__file__).parent))  # sft_jobs.py, whatever the import mode


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make(path)
    return path
