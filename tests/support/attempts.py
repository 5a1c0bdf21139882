"""Attempts without a server: what an executor, its supervisors and workers read and write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import AttemptOrder, Placement
from arbor_core.jobdir.documents import write_order
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.testing.job_directory import write_plain_document
from arbor_core.types import Device, Exit

PLACEMENT = Placement((Device("cpu:0"),), threads=1)


def attempt_order(tmp_path: Path, code: str, name: str = "1", grace: float = 5.0, **changes: Any) -> AttemptOrder:
    """An attempt whose worker runs `code`."""
    folder = tmp_path / "ftjob-x" / "attempts" / name
    folder.mkdir(parents=True)
    order = AttemptOrder(dir=folder, argv=(sys.executable, "-c", code), env={}, python=sys.executable, grace=grace)
    order = msgspec.structs.replace(order, **changes)
    write_order(order, Placement((), 1))
    return order


def write_job_document(order: AttemptOrder, entry: str) -> None:
    """What the attempt's worker reads of its job."""
    order = msgspec.structs.replace(order, entry=entry, config_type="msgspec:Struct", base="m")
    write_order(order, PLACEMENT)
    write_plain_document(AttemptDir(order.dir).job)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def ended(order: AttemptOrder) -> Exit | None:
    path = order.dir / "exit.json"
    return msgspec.json.decode(path.read_bytes(), type=Exit) if path.exists() else None
