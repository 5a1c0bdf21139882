"""A server ends the engines that an earlier one left, and nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from arbor_core.inference.process import REF, end_engines
from arbor_core.process.lifecycle import process_ref


def test_an_engine_that_was_stopped_while_it_started_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    stopped = subprocess.Popen(command, start_new_session=True)
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        for name, ref in (("1", process_ref(stopped.pid)), ("2", f"{other.pid}:1:another-boot"), ("3", "")):
            (tmp_path / name).mkdir()
            (tmp_path / name / REF).write_text(ref)
        end_engines(tmp_path)
        assert stopped.wait(30) == -9
        assert other.poll() is None
    finally:
        for process in (stopped, other):
            process.kill()
            process.wait()
