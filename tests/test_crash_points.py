"""No fault point is forgotten: whatever the code names, some test lets a process die at. And those points that the
matrices do not come to, because no job of theirs fails, is damaged or removes checkpoints (for resume points see
worker/test_resume_points.py)."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import crash
import pytest
from jobs import create, events, offered, pause
from live import LiveServer
from waiting import until

from arbor_core.jobdir import checkpoints
from arbor_core.jobdir.cleanup import LIVE, reconciled
from arbor_core.testing import JobDirectory
from arbor_core.testing.invariants import Seen
from arbor_core.testing.rollouts import group
from arbor_core.types import CheckpointDiscarded, Desired, EventType, MetricsEvent, ResultEvent

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "{event.type}.event": [f"{kind}.event" for kind in get_args(EventType)],
    "job.{desired}": [f"job.{wanted}" for wanted in get_args(Desired)],
    "{self.name}.written": ["inbox.written", "ledger.written", "results.written", "samples.written"],
    "{self.name}.rotated": ["inbox.rotated", "ledger.rotated", "results.rotated", "samples.rotated"],
    "{self.log.name}.synced": ["inbox.synced", "results.synced"],
    "{self.log.name}.marked": ["inbox.marked", "results.marked"],
    "forgotten.{name}": [f"forgotten.{name}" for name in LIVE],
}
"""The names that each f-string may come to."""
HERE = ["error.event", "withdrawn.event", "discarded.event", "skipped.event", "saved.event", "resume_point.renamed"]
MATRICES = {
    "jobs": [*crash.SERVER_ALWAYS, *crash.SERVER, *crash.WORKERS_ALWAYS, *crash.WORKERS],
    "remote": [
        *crash.REMOTE_SERVER_ALWAYS,
        *crash.REMOTE_SERVER,
        *crash.REMOTE_MACHINE,
    ],
    "rollouts": [
        *crash.SESSION_SERVER_ALWAYS,
        *crash.SESSION_SERVER,
        *crash.SESSION_WORKERS_ALWAYS,
        *crash.SESSION_WORKERS,
        *crash.DIRECT_ALWAYS,
        *crash.DIRECT,
        *crash.DIRECT_SERVER,
        *crash.SEGMENTS,
    ],
    "commands": [
        *crash.COMMAND_SERVER_ALWAYS,
        *crash.COMMAND_SERVER,
        *crash.COMMAND_WORKERS_ALWAYS,
        *crash.COMMAND_WORKERS,
        *crash.COMMAND_DIRECT_ALWAYS,
        *crash.COMMAND_DIRECT,
    ],
    "results": [*crash.RESULTS_ALWAYS, *crash.RESULTS],
    "engines": [*crash.ENGINE_ALWAYS, *crash.ENGINE],
    "uploads": [*crash.UPLOAD_POINTS_ALWAYS, *crash.UPLOAD_POINTS],
    "upgrades": crash.UPGRADES,
    "here": HERE,
}
EXCEPTIONS: dict[str, str] = {}
"""Points that nobody dies at, and why that is well."""


def points() -> Iterator[tuple[str, str]]:
    """Each name that is passed to `crash_point`, f-strings as templates, and where."""
    for path in [*ROOT.glob("arbor_core/**/*.py"), *ROOT.glob("plugins/*/arbor_*/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and getattr(called, "id", getattr(called, "attr", "")) == "crash_point":
                yield template(node.args[0]), f"{path.relative_to(ROOT)}:{node.lineno}"


def template(name: ast.expr) -> str:
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    values = (part.value if isinstance(part, ast.FormattedValue | ast.Constant) else part for part in parts)
    return "".join(str(value) if not isinstance(value, ast.AST) else f"{{{ast.unparse(value)}}}" for value in values)


def test_every_fault_point_is_one_that_somebody_dies_at() -> None:
    there = dict(points())
    assert len(there) > 50, "the points are not found any more"
    unknown = {name: where for name, where in there.items() if "{" in name and name not in FAMILIES}
    assert not unknown, "say in FAMILIES what these may be called"
    named = {each: where for name, where in there.items() for each in FAMILIES.get(name, [name])}
    died_at = {point.partition(":")[0]: matrix for matrix, listed in MATRICES.items() for point in listed}
    forgotten = {name: where for name, where in named.items() if name not in died_at and name not in EXCEPTIONS}
    assert not forgotten, "no test dies there: add them to a matrix, or to EXCEPTIONS with the reason"
    gone = {name: matrix for name, matrix in died_at.items() if name not in named}
    assert not gone, "the code has no such points any more"
    assert EXCEPTIONS.keys() <= named.keys() - died_at.keys(), "these are no exceptions"


def test_names_are_read_as_they_are_written() -> None:
    call: Any = ast.parse("crash_point('a.b'); crash_point(f'{x.y}.{z}.c')")
    assert [template(each.value.args[0]) for each in call.body] == ["a.b", "{x.y}.{z}.c"]


def dying_once(tmp_path: Path, point: str) -> dict[str, str]:
    return {"ARBOR_CRASH_BELOW": point, "ARBOR_CRASH_ONCE": str(tmp_path / "died")}


def test_a_trainer_that_dies_when_it_has_said_why_it_fails(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    server = start_server(env=dying_once(tmp_path, "error.event"))
    seen = Seen(server.storage)
    job = create(server, chat_rows, hyperparameters={"steps": 5, "fault": "fail", "fault_step": 3}).id
    found = server.wait(job, "failed")
    assert (tmp_path / "died").exists()
    assert found.error.code == "mock_failure"
    assert sorted(path.name for path in server.storage.glob(f"jobs/{job}/attempts/*")) == ["1"]
    crash.check_the_rest(server, seen)


def test_a_trainer_that_dies_when_it_has_withdrawn_a_damaged_checkpoint(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The next one finds it damaged again, sets it aside, and goes on from the one before it."""
    server = start_server(env=dying_once(tmp_path, "withdrawn.event"))
    seen = Seen(server.storage)
    client = server.new_client(_strict_response_validation=False)  # OpenAI's own type lacks "paused"
    job = create(server, chat_rows, hyperparameters={"steps": 60, "step_seconds": 0.05, "checkpoint_steps": 10}).id
    until(lambda: offered(server, job).get(20))
    pause(server, job)
    newest = max(offered(server, job))
    weights = server.storage / "jobs" / job / "checkpoints" / f"{newest}-1" / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    client.fine_tuning.jobs.resume(job)
    assert server.wait(job).status == "succeeded"
    assert (tmp_path / "died").exists()
    assert any("The training process died" in event.message for event in events(server, job))
    assert [path.name for path in checkpoints.aside(weights.parent.parent)] == [f"{newest}-1.damaged"]
    assert sorted(offered(server, job)) == [10, 20, 30, 40, 50, 60]
    crash.check_the_rest(server, seen)


KEEPS_ONE = """
def train(run):
    last = run.last_checkpoint()
    for step in range(last.step + 1 if last else 1, 5):
        with run.checkpoint(step) as folder:
            (folder / "weights").write_bytes(b"1234")
        run.keep_checkpoints(1)
    run.finish(run.last_checkpoint(), 1)
"""


def test_a_trainer_that_dies_when_it_has_discarded_a_checkpoint(
    tmp_path: Path, chat_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is still there, and removed before the next attempt begins."""
    (tmp_path / "keeps_one.py").write_text(KEEPS_ONE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    job = JobDirectory(tmp_path / "job", "mock", chat_rows, "mock/tiny")
    job.entry = "keeps_one:train"
    with monkeypatch.context() as dying:
        dying.setenv("ARBOR_CRASH_AT", "discarded.event")
        assert job.attempt() == -signal.SIGKILL
    assert [event.dir for event in job.events(CheckpointDiscarded)] == ["1-1"]
    folder = job.dir / "checkpoints"
    assert {path.name for path in checkpoints.newest_first(folder)} == {"1-1", "2-1"}
    assert reconciled(job.files.attempt(1)) == []
    assert {path.name for path in checkpoints.newest_first(folder)} == {"2-1"}
    assert job.attempt() == 0
    assert {path.name for path in checkpoints.newest_first(folder)} == {"4-2"}


def test_a_trainer_that_dies_when_it_has_told_of_skipped_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one counts them again, and no step is made of them."""
    sizes = {"num_generations": 2, "groups_per_step": 1, "max_staleness": 0, "max_steps": 2}
    job = JobDirectory(tmp_path / "job", "mock_grpo", [], "mock/tiny", sizes)
    job.send(*(group(number, version=0) for number in range(3)))
    with monkeypatch.context() as dying:
        dying.setenv("ARBOR_CRASH_AT", "skipped.event")
        assert job.attempt() == -signal.SIGKILL
    counted = job.handled()
    assert job.events()[-1].type == "skipped"
    job.ask("finish")
    assert job.attempt() == 0
    assert max(job.handled(), default=0) >= counted[-1]
    assert [event.step for event in job.events(ResultEvent)] == [len(job.events(MetricsEvent))]
