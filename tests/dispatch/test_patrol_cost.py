"""What a round of the patrol costs the server's event loop when a thousand attempts run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arbor_core import ExecutorSettings
from arbor_core.builtin.executor import LocalExecutor
from arbor_core.dispatch.monitor import Monitor, MonitoredAttempt
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.process.lifecycle import process_ref

ATTEMPTS, ROUNDS = 1000, 9
MOST_SECONDS = 0.012
"""Of the loop's own processor time, in the best of the rounds: what the rest of the machine does adds to the others.
Ten times what a quick machine needs."""
THREADS = """
import sys, threading
threads = [threading.Thread(target=sys.stdin.read, daemon=True) for _ in range(int(sys.argv[1]))]
for thread in threads:
    thread.start()
print(*(thread.native_id for thread in threads), flush=True)
threads[0].join()
"""
"""/proc tells of a thread by its id as it does of a process: a thousand refs that cost no thousand processes."""


@pytest.fixture
def refs() -> Iterator[list[str]]:
    """The refs of a thousand supervisors, as far as an executor can see."""
    command = [sys.executable, "-c", THREADS, str(ATTEMPTS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield [process_ref(int(tid)) for tid in process.stdout.readline().split()]
        process.kill()


@contextmanager
def untraced() -> Iterator[None]:
    """Without the measuring of coverage, which costs as much as what is timed."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


async def test_a_thousand_running_attempts_cost_the_event_loop_little(tmp_path: Path, refs: list[str]) -> None:
    limits: Any = SimpleNamespace(heartbeat_seconds=600.0, start_seconds=600.0)
    executor, unused = LocalExecutor(ExecutorSettings("cold", tmp_path / "run")), SimpleNamespace()
    ingest = SimpleNamespace(jobs=SimpleNamespace(add_event=None))
    monitor = Monitor(unused, ingest, unused, executor, limits)  # type: ignore[arg-type]
    for number, ref in enumerate(refs):
        files = AttemptDir(tmp_path / f"ftjob-{number}" / "attempts" / "1")
        assert files.claim(ref) == ref
        files.events.write_text("told\n")
        files.heartbeat.touch()
        job: Any = SimpleNamespace(id=f"ftjob-{number}", ref=ref, offset=5)
        monitor.monitored[job.id] = MonitoredAttempt(job, files)
    costs = []
    with untraced():
        for _ in range(ROUNDS):
            began = time.thread_time()
            await monitor.go_round()
            costs.append(time.thread_time() - began)
    attempts = monitor.monitored.values()
    assert len(attempts) == ATTEMPTS
    assert not any(attempt.missing or attempt.wakeup.is_set() for attempt in attempts)
    assert all(attempt.progress.beat and attempt.progress.missed == ROUNDS - 1 for attempt in attempts)
    print(f"{1000 * min(costs):.2f} ms of the event loop for each round of {ATTEMPTS} attempts")
    assert min(costs) < MOST_SECONDS
