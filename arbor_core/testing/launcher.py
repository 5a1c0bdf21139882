"""`check_launcher`: what the server relies on when a launcher starts the ranks of a job with several devices."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import plugins
from arbor_core.config import convert
from arbor_core.jobdir.documents import read_exit, write_order
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.process.environment import clean_env, threads_env
from arbor_core.types import AttemptOrder, Device, Launcher, Placement
from arbor_core.worker.launchers import ConfiguredLauncher

from .job_directory import write_plain_document
from .sockets import beyond_loopback, descendants, listening
from .trainer import check_light, check_misspelled

WAIT_SECONDS = 120.0
PAUSE_SECONDS = 0.02
RANKS = 2
ENTRY = "arbor_core.testing.launcher:stand_by"


def check_launcher(name: str, entry: str = ENTRY) -> None:
    """Check an installed launcher: that its struct and YAML agree, and, unless it asks for one process, that it starts
    the ranks of a job, ends when they do, says that one has failed, ends them on SIGTERM, and that nothing of it can be
    reached from other machines.

    Args:
        entry: What each rank runs, as `Trainer.entry`. Another one may bring ranks together as its libraries do, and
            then calls `stand_by`.

    Raises:
        AssertionError: what was expected.
        ArborError: there is no such launcher.
    """
    found = plugins.load()
    values = yaml_of(name)
    check_options(name, found.get("launchers", name), values)
    check_light()
    configured = ConfiguredLauncher.of(found, values)
    if configured.launcher.command(configured.options, sys.executable, RANKS) is None:
        return
    for check in (check_end, check_failure, check_signal):
        with tempfile.TemporaryDirectory() as folder, attempt(configured, Path(folder), entry) as (files, supervisor):
            check(files, supervisor)


def check_options(name: str, launcher: Launcher, values: dict[str, Any]) -> None:
    """The struct has the types, the YAML the defaults and the name."""
    assert name not in ("warm", "cold"), f"nobody can choose a launcher '{name}': launcher={name} means start={name}"
    assert values.get("name") == name, f"conf/launcher/{name}.yaml has no line 'name: {name}'"
    options = {key: value for key, value in values.items() if key != "name"}
    fields = msgspec.structs.fields(launcher.options)
    assert set(options) == {field.encode_name for field in fields}, (
        f"{name}.yaml has the keys {sorted(options)}, {launcher.options.__name__} {[f.encode_name for f in fields]}"
    )
    assert all(field.required for field in fields), f"{launcher.options.__name__} has defaults: they belong in YAML"
    convert.typed(options, launcher.options, f"{name}.yaml")
    for key in options:
        check_misspelled(key, options, launcher.options)


def check_end(files: AttemptDir, supervisor: subprocess.Popen[bytes]) -> None:
    """Ranks that end well."""
    said = sorted((files.path / f"rank-{rank}").read_text() for rank in range(RANKS))
    assert said == [f"{rank} {RANKS} {rank}" for rank in range(RANKS)], (
        f"RANK, WORLD_SIZE and LOCAL_RANK of {RANKS} ranks are {said}"
    )
    addresses = {pid: listening(pid) for pid in descendants(supervisor.pid)}
    beyond = {pid: found for pid, found in addresses.items() if beyond_loopback(found)}
    assert not beyond, f"other machines can reach processes of the attempt: {beyond}"
    (files.path / "go").touch()
    status = supervisor.wait(WAIT_SECONDS)
    assert status == 0, f"all ranks have ended well, but the status is {status}:\n{files.log.read_text()}"


def check_failure(files: AttemptDir, supervisor: subprocess.Popen[bytes]) -> None:
    """One rank fails, and the others wait for it."""
    (files.path / "fail-1").touch()
    assert supervisor.wait(WAIT_SECONDS) != 0, "a rank has failed, but the status is 0"
    ended = read_exit(files)
    assert ended, "a rank has failed, and nobody has said that the attempt has ended"


def check_signal(files: AttemptDir, supervisor: subprocess.Popen[bytes]) -> None:
    """The attempt is to end."""
    began = time.monotonic()
    supervisor.send_signal(signal.SIGTERM)
    supervisor.wait(WAIT_SECONDS)
    seconds, grace = time.monotonic() - began, AttemptOrder(files.path, (), {}, "").grace
    assert seconds < grace, f"SIGTERM did not end the ranks: they were killed after {grace:g} s"


@contextlib.contextmanager
def attempt(
    launcher: ConfiguredLauncher, folder: Path, entry: str
) -> Iterator[tuple[AttemptDir, subprocess.Popen[bytes]]]:
    """An attempt under its supervisor, once its ranks have begun."""
    files = AttemptDir(folder / "storage" / "jobs" / "ftjob-x" / "attempts" / "1")
    files.path.mkdir(parents=True)
    write_documents(files, launcher, entry)
    env = {**clean_env(), **threads_env(1), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    with files.log.open("wb") as log:
        command = [sys.executable, "-m", "arbor_core.worker.supervisor", str(files.path)]
        env |= {**launcher.order(AttemptOrder(files.path, (), {}, sys.executable), RANKS).env}
        supervisor = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=files.path, start_new_session=True)
    try:
        begun = [files.path / f"rank-{rank}" for rank in range(RANKS)]
        wait_for(lambda: supervisor.poll() is not None or all(path.exists() for path in begun))
        assert supervisor.poll() is None, f"the ranks did not begin:\n{files.log.read_text()}"
        yield files, supervisor
    finally:
        supervisor.terminate()
        supervisor.wait(WAIT_SECONDS)
    left = list((folder / "tmp").iterdir())
    assert not left, f"these are left among temporary files: {left}"


def write_documents(files: AttemptDir, launcher: ConfiguredLauncher, entry: str) -> None:
    """What supervisor and ranks read."""
    write_plain_document(files.job)
    order = AttemptOrder(files.path, (), {}, sys.executable, entry, "msgspec:Struct", "m")
    devices = tuple(Device(f"cpu:{rank}") for rank in range(RANKS))
    write_order(launcher.order(order, RANKS), Placement(devices, threads=1))


def stand_by(run: Any) -> None:
    """What each rank runs: it says who it is, and ends, well or not, when it is told to."""
    here = run.attempt_dir
    draft = here / f"rank-{run.rank}.tmp"
    draft.write_text(f"{run.rank} {run.world_size} {os.environ.get('LOCAL_RANK')}")
    draft.rename(here / f"rank-{run.rank}")
    while not (here / "go").exists():
        if (here / f"fail-{run.rank}").exists():
            os._exit(3)
        time.sleep(PAUSE_SECONDS)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"the ranks did not begin within {WAIT_SECONDS:g} s"
        time.sleep(PAUSE_SECONDS)


def yaml_of(launcher: str) -> dict[str, Any]:
    """A launcher's YAML as its plugin ships it.

    Raises:
        AssertionError: no installed plugin has `conf/launcher/<name>.yaml`.
    """
    folders = [plugin.config_dir for plugin in plugins.installed()] + [Path(plugins.__file__).parents[1] / "conf"]
    found = [path for folder in folders if folder and (path := folder / "launcher" / f"{launcher}.yaml").is_file()]
    assert found, (
        f"no plugin has conf/launcher/{launcher}.yaml inside its package: the defaults of its options go there"
    )
    return convert.load_yaml(found[0])
