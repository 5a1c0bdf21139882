"""An attempt that is to finish makes what earlier attempts had made, and nothing beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest

from arbor_core import ResultEvent
from arbor_core.jobdir.groups import entry
from arbor_core.jobdir.inbox import Inbox, end_of, segments
from arbor_core.testing import JobDirectory
from arbor_core.testing.rollouts import SIZE, check_report_skipped, group, groups, running, steps_of

pytest.importorskip("arbor_mock")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_paused_job_that_is_finished_uses_no_group_that_waits(tmp_path: Path, damaged: bool) -> None:
    job = JobDirectory(tmp_path / "job", "mock_grpo", [], "mock/tiny", SIZE)
    with running(job) as attempt:
        attempt.learn(1)
        attempt.learn(2)
        check_report_skipped(attempt)  # of that the checkpoint knows nothing
        job.ask("pause")
        attempt.end("asked to pause")
    job.send(*groups(3))
    if damaged:
        _, last = segments(job.dir / "inbox")[-1]
        last.write_bytes(last.read_bytes()[:-1] + b"\0")
    job.ask("finish")
    with running(job) as attempt:
        attempt.end("asked to finish")
    assert steps_of(job) == []
    assert [event.step for event in job.events(ResultEvent)] == [2]


def test_what_is_asked_while_it_catches_up(tmp_path: Path) -> None:
    """It was killed, runs again, and is asked to finish before it is where it was."""
    job = JobDirectory(tmp_path / "job", "mock_grpo", [], "mock/tiny", {**SIZE, "step_seconds": 0.3})
    with running(job) as attempt:
        attempt.learn(1)
        attempt.learn(2)
    job.send(*groups(3))
    with running(job) as attempt:
        attempt.until(lambda: steps_of(job) == [1], "step 1 again")
        job.ask("finish")
        attempt.end("asked to finish")
    assert steps_of(job)[-1] in (2, 3), "the groups of step 3 may have been taken before"
    assert [event.step for event in job.events(ResultEvent)] == steps_of(job)[-1:]


def test_where_so_many_records_end(tmp_path: Path) -> None:
    box = Inbox(tmp_path, segment_bytes=600)
    ends = [box.append([entry(group(number, 0), number)])[0] for number in range(6)]
    box.close()
    assert len(segments(tmp_path)) > 1
    assert [end_of(tmp_path, count) for count in range(8)] == [0, *ends, ends[-1]]
