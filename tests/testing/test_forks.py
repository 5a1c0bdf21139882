"""Processes that are forked are as new ones, but for what they have imported."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from arbor_core.testing.forks import Forked, Forks, forks

MODULES = ("arbor_core.crash_points", "no_module_of_this_name")
SECONDS = 120


def begun(code: str, *arguments: str, **env: str) -> Forked:
    with TemporaryFile() as errors:
        return forks(MODULES, os.environ).start(code, arguments, env={**os.environ, **env}, stderr=errors)


def test_a_fork_has_arguments_an_environment_a_directory_and_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import os, sys; print('arbor_core.crash_points' in sys.modules, sys.argv[1:], os.environ['A'], os.getcwd())"
    process = begun(code, "x", "y", A="b")
    assert process.wait(SECONDS) == 0
    assert process.stdout
    assert process.stdout.read().decode().strip() == f"True ['x', 'y'] b {tmp_path}"


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(7)", 7), ("1 / 0", 1)])
def test_how_a_fork_ends_is_told(code: str, status: int) -> None:
    process = begun(code)
    assert process.wait(SECONDS) == process.poll() == process.returncode == status


def test_a_fork_can_be_killed_and_waited_for() -> None:
    process = begun("import signal; signal.pause()")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.0)
    process.kill()
    assert process.wait(SECONDS) == -signal.SIGKILL
    process.kill()  # nobody's: its number may be another's


def test_fault_points_are_those_of_the_forks_environment() -> None:
    code = "from arbor_core.crash_points import crash_point; crash_point('here'); crash_point('there')"
    assert begun(code, ARBOR_CRASH_AT="there").wait(SECONDS) == -signal.SIGKILL
    assert begun(code).wait(SECONDS) == 0


def test_one_process_forks_for_all_that_import_the_same() -> None:
    assert forks(MODULES, os.environ) is forks(MODULES, {**os.environ, "A": "b"})
    with_path = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:/nowhere"}
    other = forks(MODULES, with_path)
    assert other is not forks(MODULES, os.environ)
    other.close()


def test_a_fork_whose_end_nobody_saw_is_an_error() -> None:
    parent = Forks((), os.environ)
    with TemporaryFile() as errors:
        process = parent.start("import signal; signal.pause()", env=os.environ, stderr=errors)
    parent.close()
    try:
        with pytest.raises(RuntimeError, match="nobody knows how"):
            process.wait(SECONDS)
    finally:
        os.kill(process.pid, signal.SIGKILL)
