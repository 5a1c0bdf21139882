"""When resume points are due."""

from __future__ import annotations

import pytest

from arbor_core.worker import resume_clock
from arbor_core.worker.resume_clock import ResumeClock


def test_resume_points_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(resume_clock.time, "monotonic", lambda: now)
    clock = ResumeClock(60)
    for later, due in ((59, False), (60, True)):
        now = 1000 + later
        assert clock.is_due() == due
    with clock.writing():
        now += 3  # 50 times as long is more than 60 s
    written = now
    for later, due in ((149, False), (150, True)):
        now = written + later
        assert clock.is_due() == due


def test_always_and_never() -> None:
    assert ResumeClock(0).is_due()
    assert not ResumeClock(None).is_due()
