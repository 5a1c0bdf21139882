"""Who starts the ranks of a job with several devices, and who can reach them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from arbor_core import ArborError, AttemptOrder, Launcher, RanksCommand
from arbor_core.config import compose
from arbor_core.plugins import load
from arbor_core.testing import launcher as kit
from arbor_core.testing.sockets import beyond_loopback, descendants, listening
from arbor_core.worker.launchers import RANK, ConfiguredLauncher, accelerate

ORDER = AttemptOrder(Path("/jobs/1/attempts/1"), (), {"ATEN_CPU_CAPABILITY": "avx2"}, "/venv/python")


def configured(name: str, **options: object) -> ConfiguredLauncher:
    return ConfiguredLauncher.of(load(), {**compose.defaults("launcher", name), **options})


def test_one_process_needs_no_launcher() -> None:
    for name in ("none", "torchrun"):
        assert configured(name).order(ORDER, 1) == ORDER


def test_none_is_one_process_for_all_devices() -> None:
    assert configured("none").order(ORDER, 2) == ORDER


def test_torchrun_starts_a_process_for_each_device() -> None:
    order = configured("torchrun").order(ORDER, 3)
    assert order.argv[0] == "/venv/python" and order.argv[-3:] == RANK
    assert "--nproc-per-node=3" in order.argv
    assert order.env == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **ORDER.env}
    assert not any(word.startswith("/") for word in order.argv[1:]), "no path of this machine is stored"


def test_the_command_is_the_operators() -> None:
    order = configured("torchrun", command=["mpirun", "-np", "{ranks}", "{python}"], env={"A": "1"}).order(ORDER, 2)
    assert order.argv == ("mpirun", "-np", "2", "/venv/python", *RANK)
    assert order.env == {"A": "1", **ORDER.env}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "torchrun", "command": ["{pyhton}"], "env": {}}, r"'command' may hold \{python\} and \{ranks\}"),
        ({"name": "torchrun", "command": ["{"], "env": {}}, r"'command' may hold \{python\} and \{ranks\}"),
        ({"name": "torchrun", "command": [], "env": {}}, "'command' is empty"),
        ({"name": "torchrun", "comand": [], "env": {}}, r"'launcher.comand'. Did you mean 'command'\?"),
        ({"name": "none", "command": []}, "Unknown parameter: 'launcher.command'"),
        ({"name": "torchrum", "command": []}, "did you mean 'torchrun'"),
        ({"command": []}, r"launcher\.name"),
        ({"name": "accelerate"}, "accelerate_config=FILE"),
        ({"name": "deepspeed"}, "there is no launcher 'deepspeed' yet"),
    ],
)
def test_a_mistake_is_named_when_the_server_starts(values: dict[str, object], says: str) -> None:
    with pytest.raises(ArborError, match=says):
        ConfiguredLauncher.of(load(), values)


def test_a_plugin_brings_a_launcher(plugins, plugin) -> None:  # type: ignore[no-untyped-def]
    def command(options: object, python: str, ranks: int) -> RanksCommand:
        return RanksCommand(("srun", f"-n{ranks}", python))

    plugin("acme 1.0", arbor_launchers=lambda: {"slurm": Launcher(msgspec.Struct, command)})
    order = ConfiguredLauncher.of(plugins, {"name": "slurm"}).order(ORDER, 4)
    assert order.argv == ("srun", "-n4", "/venv/python", *RANK)


def test_the_key_accelerate_config_means_what_it_meant(tmp_path: Path) -> None:
    order = accelerate(tmp_path / "a.yaml").order(ORDER, 2)
    config = ("--config_file", str(tmp_path / "a.yaml"), "--num_processes", "2")
    assert order.argv == ("/venv/python", "-m", "accelerate.commands.launch", *config, *RANK)
    assert order.env == ORDER.env, "it may name other machines"
    assert accelerate(tmp_path / "a.yaml").order(ORDER, 1) == ORDER


MEETING = """
import torch, torch.distributed as ranks
from arbor_core.testing.launcher import stand_by

def train(run):
    ranks.init_process_group("gloo")  # as trainers do that know nothing of Arbor
    both = torch.tensor([run.rank + 1.0])
    ranks.all_reduce(both)
    ranks.barrier(ranks.new_group([0, 1]))
    assert both.item() == 3.0
    stand_by(run)
    ranks.destroy_process_group()
"""


@pytest.mark.ml
def test_two_ranks_of_torchrun_meet_where_no_other_machine_can_reach_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meeting.py").write_text(MEETING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with kit.attempt(configured("torchrun"), tmp_path / "attempt", "meeting:train") as (files, supervisor):
        processes = descendants(supervisor.pid)
        assert len(processes) >= 4, "the supervisor, torchrun, and two ranks"
        assert any(listening(pid) for pid in processes), "they meet somewhere"
        kit.check_end(files, supervisor)


@pytest.mark.ml
@pytest.mark.slow
def test_the_kit_finds_a_launcher_that_listens_everywhere(tmp_path: Path) -> None:
    command = ["{python}", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node={ranks}", "--log-dir=work"]
    with (
        pytest.raises(AssertionError, match="other machines can reach processes of the attempt"),
        kit.attempt(configured("torchrun", command=command), tmp_path, kit.ENTRY) as (files, supervisor),
    ):
        kit.check_end(files, supervisor)


def test_the_kit_finds_a_launcher_that_tells_no_rank_who_it_is(tmp_path: Path) -> None:
    command = ["{python}", "-c", "import subprocess, sys; [subprocess.run(sys.argv[1:]) for n in range(2)]", "{python}"]
    launcher = configured("torchrun", command=command)
    (tmp_path / "alone.py").write_text("def train(run):\n    pass\n")
    with (
        pytest.raises(AssertionError, match="the ranks did not begin"),
        kit.attempt(launcher, tmp_path / "attempt", "alone:train"),
    ):
        pass


def test_the_look_at_sockets_finds_one_that_listens_everywhere() -> None:
    code = (
        "import socket,sys; s=[socket.create_server(('0.0.0.0',0)), socket.create_server(('127.0.0.1',0))];"
        "six=socket.create_server(('::',0), family=socket.AF_INET6) if socket.has_dualstack_ipv6() else None;"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = listening(process.pid)
        assert "127.0.0.1" in found and "0.0.0.0" in beyond_loopback(found)
        assert found <= {"127.0.0.1", "0.0.0.0", "::"}
        process.communicate()
