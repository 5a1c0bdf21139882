"""What is left of a session whose leader was killed is ended, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arbor_core.process import lifecycle
from arbor_core.process.lifecycle import kill_session, lives, process_ref

SLEEP = [sys.executable, "-c", "import time; time.sleep(999)"]


def test_what_outlives_its_supervisor_is_ended(tmp_path: Path) -> None:
    start = f"import os, subprocess; print(subprocess.Popen({SLEEP}, stdout=2).pid, flush=True); input(); os.abort()"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert supervisor.stdout is not None
    stray = int(supervisor.stdout.readline())
    ref = process_ref(supervisor.pid)
    supervisor.communicate("go on\n", timeout=120)
    with subprocess.Popen(SLEEP, cwd=tmp_path) as other:
        assert process_ref(stray)
        kill_session(ref)
        assert not process_ref(stray)
        assert other.poll() is None
        other.kill()


def test_what_left_the_session_of_one_that_lives_is_ended_with_it() -> None:
    """The ranks of a launcher, say: each has a session of its own, and outlives the launcher for a moment."""
    start = (
        "import subprocess, sys; sleep = lambda: subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=2)\n"
        "print(sleep().pid, sleep().pid, flush=True); input()"
    )
    command = [sys.executable, "-c", start, *SLEEP]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as leader:
        assert leader.stdout is not None
        ranks = [process_ref(int(pid)) for pid in leader.stdout.readline().split()]
        assert len(ranks) == 2
        assert all(map(lives, ranks))
        kill_session(process_ref(leader.pid))
        assert not any(map(lives, ranks))
        assert leader.wait(120) == -signal.SIGKILL


def test_row_113_a_session_that_was_given_to_another_is_left_alone() -> None:
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, ('я' * 8).encode(), 0, 0, 0)"  # cut inside a letter
    foreign = subprocess.Popen([sys.executable, "-c", f"{rename}; {SLEEP[2]}"], start_new_session=True)
    try:
        while not (cut := Path(f"/proc/{foreign.pid}/comm").read_bytes()).startswith("я".encode()):
            assert foreign.poll() is None
        with pytest.raises(UnicodeDecodeError):
            cut.decode()
        pid, start, boot = process_ref(foreign.pid).split(":")
        for ref in (f"{pid}:{int(start) - 1}:{boot}", f"{pid}:{start}:{'0' * len(boot)}"):
            kill_session(ref)
        assert foreign.poll() is None
        kill_session(f"{pid}:{start}:{boot}")
        assert foreign.wait(120) == -signal.SIGKILL
    finally:
        foreign.kill()
        foreign.wait()


def test_a_session_that_does_not_end_is_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "KILL_SECONDS", 0.1)
    with subprocess.Popen(SLEEP, start_new_session=True) as stuck, monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: None)  # as if it hung in the kernel
        with pytest.raises(TimeoutError, match=str(stuck.pid)):
            kill_session(process_ref(stuck.pid))
        patch.undo()
        stuck.kill()
