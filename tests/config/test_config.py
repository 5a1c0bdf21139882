"""The command line, `~/.arbor/config.yaml`, and how YAML becomes structs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import msgspec
import pytest
import server_process
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from arbor_core import ArborError, AttemptOrder, ConfigError
from arbor_core.config import compose, convert, settings, user_file
from arbor_core.storage.codec import decode, encode


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    rank: int


class Example(msgspec.Struct, forbid_unknown_fields=True):
    n_epochs: Annotated[int, msgspec.Meta(ge=1, le=50)] | Literal["auto"]
    learning_rate: Annotated[float, msgspec.Meta(gt=0)]
    flag: bool
    lora: Inner | None


QWEN, BOTH = {"Qwen/*": "transformers"}, {"Qwen/*": "transformers", "tiny": "mock"}
GOOD = {"n_epochs": 3, "learning_rate": 0.1, "flag": True, "lora": {"rank": 4}}


@pytest.mark.parametrize(
    ("change", "code", "path", "says"),
    [
        ({"learing_rate": 1}, "unknown_parameter", "h.learing_rate", "Did you mean 'learning_rate'?"),
        ({"lora": {"rnk": 1, "rank": 1}}, "unknown_parameter", "h.lora.rnk", "Did you mean 'rank'?"),
        ({"lora": {}}, "missing_required_parameter", "h.lora.rank", "Missing required parameter"),
        ({"n_epochs": 0}, "integer_below_min_value", "h.n_epochs", ">= 1"),
        ({"n_epochs": 51}, "integer_above_max_value", "h.n_epochs", "<= 50"),
        ({"n_epochs": 1.5}, "invalid_type", "h.n_epochs", "float"),
        ({"n_epochs": True}, "invalid_type", "h.n_epochs", "bool"),
        ({"n_epochs": "lots"}, "invalid_value", "h.n_epochs", "lots': expected a number, or 'auto'."),
        ({"learning_rate": 0}, "decimal_below_min_value", "h.learning_rate", "> 0"),
        ({"learning_rate": "fast"}, "invalid_type", "h.learning_rate", "str"),
        ({"flag": "yes"}, "invalid_type", "h.flag", "bool"),
        ({"n_epochs": "${oc.env:HOME}"}, "invalid_value", "h.n_epochs", "Invalid"),
    ],
)
def test_a_mistake_is_named_with_the_key_as_the_user_typed_it(change, code, path, says):
    with pytest.raises(ConfigError) as caught:
        convert.typed({**GOOD, **change}, Example, where="h")
    assert (caught.value.code, caught.value.path) == (code, path)
    assert says in str(caught.value)


def test_good_values_are_typed():
    made = convert.typed({**GOOD, "n_epochs": "auto"}, Example, where="h")
    assert made.n_epochs == "auto" and made.lora == Inner(4)


def test_merging_is_by_key_and_changes_nothing():
    base = {"a": 1, "b": {"c": 2, "d": 3}}
    assert convert.merged(base, {"b": {"c": 9}, "e": None}) == {"a": 1, "b": {"c": 9, "d": 3}, "e": None}
    assert base == {"a": 1, "b": {"c": 2, "d": 3}}


def test_serve_yaml_and_its_struct_have_the_same_keys():
    said = yaml.safe_load((compose.core_config_dir() / "serve.yaml").read_text())
    of_commands = {"trainer", "trainers", "default_trainer"}  # only there when somebody asks for them
    of_groups = {"launcher"}
    hydra_own = {"defaults", "hydra"}
    keys = {field.name for field in msgspec.structs.fields(settings.ServeConfig)}
    assert set(said) - hydra_own == keys - of_commands - of_groups
    for name in ("gpu", "inference", "models", "auth", "plugins", "limits"):
        inner = next(f.type for f in msgspec.structs.fields(settings.ServeConfig) if f.name == name)
        assert set(said[name]) == {field.name for field in msgspec.structs.fields(inner)}


def test_every_key_of_serve_yaml_is_explained():
    lines = (compose.core_config_dir() / "serve.yaml").read_text().splitlines()
    before = ""
    with_the_one_above = ("port", "allocator", "executor")
    for line in lines[: lines.index("hydra:")]:
        key = line.strip().partition(":")[0]
        value = line.partition(":")[2].strip()
        if value and not line.strip().startswith(("#", "- ")) and key not in with_the_one_above:
            assert before.strip().startswith("#"), f"{key} has no comment above it"
        before = line


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ARBOR_HOME", str(tmp_path))
    return tmp_path


def arbor_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    if any("engine." in word for word in arguments):
        arguments = ("inference=mock", *arguments)
    return server_process.ran(*arguments)


def composed(*arguments: str) -> dict:
    done = arbor_serve("--cfg", "job", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_the_user_file_lies_between_the_defaults_and_the_command_line(home):
    (home / "config.yaml").write_text("port: 9000\nmodels: {dirs: ['/m/a b', \"/it's\"]}\nlimits: {attempts: 7}\n")
    found = composed("limits.attempts=8")
    assert found["port"] == 9000
    assert found["models"] == {"dirs": ["/m/a b", "/it's"], "allow": ["*"]}
    assert found["limits"]["attempts"] == 8


def test_the_originals_keys_mean_what_they_say(home):
    (home / "config.yaml").write_text(
        "storage_path: /data\ninference: {gpu_ids: [0]}\ntraining: {gpu_ids: [1, 2]}\n"
        "inactivity_timeout: 30\naccelerate_config: /a.yaml\n"
    )
    found = composed()
    assert found["storage"] == "/data"
    assert found["gpu"] == {"train": [1, 2], "inference": [0]}
    assert found["limits"]["engine_idle_seconds"] == 30
    assert found["accelerate_config"] == "/a.yaml"
    assert found["inference"] == {"default": "transformers", "models": {}, "replicas": {}}


@pytest.mark.parametrize(
    ("file", "arguments", "wanted"),
    [
        ("inference: mock\n", (), {"default": "mock", "models": {}, "replicas": {}}),
        ("", ("inference=mock", "inference.models={Qwen/*:transformers}"), {"default": "mock", "models": QWEN}),
        ("", ("inference.models={Qwen/*:transformers}", "inference=mock"), {"default": "mock", "models": QWEN}),
        ("", ("++inference='mock'", "inference.replicas={a\\:b:2}"), {"default": "mock", "replicas": {"a:b": 2}}),
        ("inference: {gpu_ids: [3], default: mock, models: {Qwen/*: transformers}}\n", (), {"models": QWEN}),
        ("inference: {models: {'a[b] =\\,{}:': mock}}\n", (), {"models": {"a[b] =\\,{}:": "mock"}}),
        ("inference: {models: {Qwen/*: transformers}}\n", ("inference.models={tiny:mock}",), {"models": BOTH}),
    ],
)
def test_backends_of_models(home, file, arguments, wanted):
    (home / "config.yaml").write_text(file)
    found = composed(*arguments)["inference"]
    assert {key: found[key] for key in wanted} == wanted
    assert list(found["models"]) == list(wanted.get("models", {})), "the first that matches counts"


def test_a_pattern_that_hydra_cannot_read_is_named(home):
    (home / "config.yaml").write_text("inference: {models: {'[!a]*': mock}}\n")
    with pytest.raises(ConfigError, match=r"'\[!a\]\*' cannot be a key .* it holds '!'"):
        user_file.overrides(os.environ)


def test_settings_without_a_command_line_name_backends_as_it_does():
    found = compose.serve_settings("inference=mock", "inference.models={Qwen/*:transformers}", "engines.x.a=1")
    assert (found.inference.default, found.inference.models, found.engines) == ("mock", QWEN, {"x": {"a": 1}})


def test_one_list_of_gpus_is_for_training_and_serving(home):
    (home / "config.yaml").write_text("gpu_ids: [0, 1, 2]\n")
    assert composed()["gpu"] == {"train": [0, 1], "inference": [2]}


LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
RENAMED = "the key 'launcher' is called 'start' now: write start=warm or start=cold\n"


@pytest.mark.parametrize(
    ("file", "argument", "start"),
    [
        ("", "launcher=cold", "cold"),
        ("", "++launcher='cold'", "cold"),
        ("launcher: cold\n", "port=1", "cold"),
        ("launcher: cold\n", "launcher=warm", "warm"),
        ("start: cold\n", "launcher=warm", "warm"),
        ("launcher: cold\n", "start=warm", "warm"),
    ],
)
def test_launcher_is_the_old_name_of_start(home, file, argument, start):
    (home / "config.yaml").write_text(file)
    done = arbor_serve("--cfg", "job", argument)
    assert (done.returncode, done.stderr) == (0, RENAMED)
    found = yaml.safe_load(done.stdout)
    assert found["start"] == start and found["launcher"]["name"] == "torchrun"


def test_start_needs_no_warning(home):
    (home / "config.yaml").write_text("start: cold\n")
    done = arbor_serve("--cfg", "job")
    assert (yaml.safe_load(done.stdout)["start"], done.stderr) == ("cold", "")


def test_launcher_in_a_yaml_file_of_the_operator(home, tmp_path):
    """The configuration of this file is laid over serve.yaml: the server refuses to start after it was read."""
    (tmp_path / "mine.yaml").write_text("defaults: [serve, _self_]\nlauncher: cold\nmodels: {dirs: [/nowhere]}\n")
    done = arbor_serve("-cd", str(tmp_path), "-cn", "mine", "port=0")
    assert done.stderr == f"{RENAMED}arbor-serve: models.dirs: there is no folder /nowhere\n"


def test_launcher_in_settings_and_what_it_may_mean_later(caplog):
    compose_values = {"start": "warm", "launcher": "cold", "port": 1}
    user_file.warn_of_launcher.cache_clear()
    assert user_file.with_new_keys(compose_values) == {"start": "cold", "port": 1}
    assert user_file.with_new_keys(compose_values) == {"start": "cold", "port": 1}
    assert [record.getMessage() for record in caplog.records] == [RENAMED.strip()], "one warning"
    assert user_file.with_new_keys({"launcher": {"name": "none"}}) == {"launcher": {"name": "none"}}
    assert user_file.with_new_key("launcher=torchrun") == "launcher=torchrun"


@pytest.mark.parametrize(
    ("file", "arguments", "launcher"),
    [
        ("", ["launcher=none"], {"name": "none"}),
        ("launcher: none\n", [], {"name": "none"}),
        ("launcher: none\n", ["launcher=torchrun"], "torchrun"),
        ("launcher: {name: torchrun, command: [run]}\n", [], {"command": ["run"]}),
        ("launcher: {env: {A: b}}\n", ["launcher.env.C=d"], {"env": {**LOOPBACK, "A": "b", "C": "d"}}),
        ("launcher: cold\n", ["launcher=none", "start=warm"], {"name": "none"}),
        ("launcher: none\n", ["launcher=warm"], {"name": "none"}),
    ],
)
def test_launcher_starts_ranks(home, file, arguments, launcher):
    (home / "config.yaml").write_text(file)
    found = composed(*arguments)
    assert found["start"] == "warm"
    if launcher == "torchrun":
        assert found["launcher"]["env"] == LOOPBACK
    else:
        assert {key: found["launcher"][key] for key in launcher} == launcher
    assert set(found["launcher"]) == ({"name"} if launcher == {"name": "none"} else {"name", "command", "env"})


def test_an_order_of_an_earlier_server_is_read():
    """Nothing is started from an order a second time, so what its `launcher` was does not matter."""
    order = AttemptOrder(Path("/jobs/1/attempts/1"), (), {}, sys.executable)
    old = {**json.loads(encode(order)), "launcher": "warm"}
    del old["start"]
    assert decode(json.dumps(old).encode(), AttemptOrder) == order


def test_settings_without_a_command_line():
    assert not GlobalHydra.instance().is_initialized()
    found = compose.serve_settings("port=9", "limits.attempts=7", "start=cold", "launcher=none")
    assert (found.port, found.limits.attempts, found.start) == (9, 7, "cold")
    assert found.launcher == {"name": "none"}
    assert not GlobalHydra.instance().is_initialized(), "it is left as it was"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("prot=9", "no key 'prot'; did you mean 'port'?"),
        ("port=abc", "Invalid 'port'"),
        ("auth.keys=[secret", "cannot read 'auth.keys=...'"),
        ("gpu.train=[", "cannot read 'gpu.train=['"),
        ("launcher=accelerate", "there is no launcher 'accelerate' yet"),
        ("+trainer=mokc", "did you mean 'mock'?"),
        (
            "+trainer=mock trainer.learning_rat=3",
            "no key 'trainer.learning_rat'; did you mean 'trainer.learning_rate'?",
        ),
        ("+trainer=mock trainer.port=3", "no key 'trainer.port'; see them all"),
        ("trainer.steps=3", "no key 'trainer.steps' without a method: choose it with +trainer=NAME"),
        ("storage=${nowhere}", "nowhere"),
    ],
)
def test_a_mistake_in_settings_is_named_in_plain_words(word, says):
    with pytest.raises(ArborError) as caught:
        compose.serve_settings(*word.split())
    assert says in str(caught.value) and "secret" not in str(caught.value)


def test_settings_take_the_words_of_the_command_line():
    found = compose.serve_settings("engine.max_batch=3", "trainers.mock.steps=4", "launcher.env.A=b", "launcher=cold")
    assert (found.engine, found.trainers, found.start) == ({"max_batch": 3}, {"mock": {"steps": 4}}, "cold")
    assert found.launcher["env"]["A"] == "b"


def test_the_defaults_of_a_group_need_no_initialised_hydra(monkeypatch, tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/base.yaml").write_text("learning_rate: 1e-5\nsteps: 3\n")
    (tmp_path / "trainer/longer.yaml").write_text("defaults: [base, _self_]\nsteps: 9\nwarmup: ${.steps}\n")
    (tmp_path / "trainer/broken.yaml").write_text("steps: [\n")
    ours = SimpleNamespace(label="ours 1.0", config_dir=tmp_path)
    monkeypatch.setattr(compose, "installed", lambda: [ours])
    assert compose.defaults("trainer", "base") == {"learning_rate": 1e-5, "steps": 3}
    assert compose.defaults("trainer", "nobody's") == {}
    longer = {"learning_rate": 1e-5, "steps": 9, "warmup": 9}
    assert compose.defaults("trainer", "longer") == longer
    assert not GlobalHydra.instance().is_initialized()
    with initialize_config_dir(str(compose.core_config_dir()), version_base="1.3"):
        assert compose.defaults("trainer", "longer") == longer
        assert GlobalHydra.instance().is_initialized(), "whose program initialised it goes on with it"
    with pytest.raises(ConfigError, match="broken.yaml: line 2"):
        compose.defaults("trainer", "broken")


def test_the_storage_defaults_to_the_home(home):
    done = arbor_serve("--cfg", "job", "--resolve")
    assert yaml.safe_load(done.stdout)["storage"] == f"{home}/storage"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prot: 1\n", "unknown key 'prot'; did you mean 'port'?"),
        ("port: [\n", "config.yaml"),
        ("a: 1\nport: [\n", "config.yaml: line 3: expected the node content"),
        ("- a\n", "expected a mapping"),
        ("training: 3\n", "'training' may hold gpu_ids"),
        ("training: {gpus: [1]}\n", "'training' may hold gpu_ids"),
        (None, "Is a directory"),
    ],
)
def test_a_wrong_user_file_is_one_line(home, content, says):
    path = home / "config.yaml"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match="config.yaml"):
        user_file.overrides(os.environ)
    done = arbor_serve()
    assert done.returncode != 0
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("gpu.trian=[0]", "no key 'gpu.trian'; did you mean 'gpu.train'?"),
        ("bogus=1", "no key 'bogus'"),
        ("+trainer=mokc", "no trainer called 'mokc'; did you mean 'mock'?"),
        ("port=abc", "Invalid 'port': Expected `int`, got `str`"),
        ("gpu.train=abc", "Invalid 'gpu.train'"),
        ("gpu.train=[", "cannot read 'gpu.train=['"),
        ("scheduler=fifi", "no scheduler called 'fifi'; did you mean 'fifo'?"),
        ("allocator=ray", "pip install arbor-ray"),
        ("inference=vllm", "pip install arbor-vllm"),
        ("inference.models={a:mcok}", "did you mean 'mock'?"),
        ("inference.modles={a:mock}", "did you mean 'inference.models'?"),
        ("inference.replicas={a:0}", "Invalid 'inference.replicas': Expected `int` >= 1"),
        ("engines.mcok.context=1", "did you mean 'mock'?"),
        ("engines.mock.contxt=1", "'engines.mock.contxt'. Did you mean 'context'?"),
        ("plugins.disabled=[nobody]", "no plugin called nobody"),
        ("+trainers.mock.stpes=1", "Did you mean 'steps'?"),
        ("host=0.0.0.0", "auth.keys"),
        ("start=luke", "Invalid 'start'"),
        ("launcher=luke", "no launcher called 'luke'; installed: "),
        ("launcher=torchrum", "no launcher called 'torchrum'; did you mean 'torchrun'?"),
        ("launcher=accelerate", "there is no launcher 'accelerate' yet: accelerate_config=FILE"),
        ("launcher=deepspeed", "there is no launcher 'deepspeed' yet"),
        ("launcher.command=['{pyhton}']", "'command' may hold {python} and {ranks}, but it has 'pyhton'"),
        ("launcher.comand=[a]", "no key 'launcher.comand'"),
        ("trainer=sft", "+trainer=NAME"),
        ("engine.token_secondss=1", "Did you mean 'token_seconds'?"),
        ("port=99999", "Invalid 'port': Expected `int` <= 65535"),
        ("gpu.train=[0,0]", "a device is named twice in 'train'"),
        ("gpu.train=[0-3,2]", "a device is named twice in 'train'"),
        ("gpu.train=[3-0]", "'3-0' names no device"),
        ("gpu.inference=[-1]", "Invalid 'gpu.inference[0]'"),
        ("auth.keys=['']", "Invalid 'auth.keys[0]'"),
        ("auth.keys=['two words']", "Invalid 'auth.keys[0]'"),
        ("limits.attempts=0", "Invalid 'limits.attempts'"),
        ("limits.upload_bytes=-1", "Invalid 'limits.upload_bytes'"),
        ("limits.engine_idle_seconds=nan", "Invalid 'limits.engine_idle_seconds'"),
        ("threads=0", "Invalid 'threads'"),
        ("organization=a:b", "Invalid 'organization'"),
        ("models.dirs=[/nowhere]", "models.dirs: there is no folder /nowhere"),
        ("accelerate_config=/nowhere.yaml", "there is no file /nowhere.yaml"),
    ],
)
def test_a_wrong_argument_is_one_line_and_no_traceback(home, argument, says):
    done = arbor_serve("port=0", argument)
    assert done.returncode != 0
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not done.stdout


def test_row_108_a_port_in_use_is_one_line_before_anything_is_touched(home):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = arbor_serve(f"port={port}", "inference=mock")
    assert done.returncode == 1
    assert done.stderr == f"arbor-serve: address 127.0.0.1:{port} is already in use\n"
    assert not (home / "storage").exists()


def test_help_names_methods_and_keys(home):
    done = arbor_serve("--help")
    assert done.returncode == 0
    for word in ("arbor-serve", "trainer: ", "port: 7453", "gpu:"):
        assert word in done.stdout


def test_a_trainer_on_the_command_line_brings_its_defaults(home):
    found = composed("+trainer=mock", "trainer.learning_rate=3e-4")
    assert found["trainer"]["learning_rate"] == 3e-4
    assert composed("+trainer@trainers.mock=mock", "trainers.mock.steps=5")["trainers"]["mock"]["steps"] == 5


def test_multirun_composes_each_choice(home, tmp_path):
    done = arbor_serve("-m", "scheduler=fifi,fofi", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode != 0 and "fifi" in done.stderr


def test_the_commands_of_arbor(home):
    def arbor(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "arbor_core", *arguments], capture_output=True, text=True, timeout=60
        )

    listed = arbor("plugins")
    assert all(word in listed.stdout for word in ("trainer mock", "scheduler fifo", "launcher torchrun"))
    assert arbor("nonsense").returncode == 2
    assert json.loads(json.dumps(arbor("--help").stdout)).startswith("usage: arbor")
