"""Finding, loading and looking up plugins."""

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from waiting import until

from arbor_core import ArborError, JobView, Launcher, MetricsEvent, Trainer, hookspecs
from arbor_core import plugins as loading
from arbor_core.dispatch.observers import Observers

ANY = Trainer(config=msgspec.Struct, entry="x:y")
HOOKS = [name for name in vars(hookspecs) if name.startswith("arbor_")]


def test_hook_arbor_trainers_are_found_by_name(plugins, plugin):
    plugin("acme 1.0", arbor_trainers=lambda: {"acme": ANY})
    assert plugins.get("trainers", "acme") is ANY
    assert plugins.owner("trainers", "acme") == "acme 1.0"


@pytest.mark.parametrize("kind", ["schedulers", "allocators", "executors", "inference_backends"])
def test_hook_arbor_schedulers_allocators_executors_inference_backends(plugins, plugin, kind):
    made = object()
    plugin("acme 1.0", **{f"arbor_{kind}": lambda: {"mine": lambda: made}})
    assert plugins.get(kind, "mine")() is made


def test_hook_arbor_launchers_are_found_by_name(plugins, plugin):
    mine = Launcher(msgspec.Struct, lambda options, python, ranks: None)
    plugin("acme 1.0", arbor_launchers=lambda: {"mine": mine, "accelerate": mine})
    assert plugins.get("launchers", "mine") is mine
    assert plugins.get("launchers", "accelerate") is mine, "whoever brings a reserved name has it"
    with pytest.raises(ArborError, match="there is no launcher 'deepspeed' yet: accelerate_config=FILE"):
        plugins.get("launchers", "deepspeed")


def test_hook_arbor_tiny_models_are_for_commands(plugins, plugin):
    plugin("acme 1.0", arbor_tiny_models=lambda: {"small": "acme.models:write"})
    assert plugins.get("tiny_models", "small") == "acme.models:write"
    with pytest.raises(ArborError, match=r"tiny model 'tiny' is not installed: pip install arbor-sft"):
        plugins.get("tiny_models", "tiny")
    assert "tiny_models" not in loading.KINDS, "a server has no use for them"


def test_a_server_without_devices_prefers_a_simulation(plugins, plugin):
    plugin("acme 1.0", arbor_trainers=lambda: {"real": ANY, "pretend": dataclasses.replace(ANY, simulated=True)})
    assert plugins.simulated_trainer() == "pretend"


def test_a_server_without_devices_says_which_simulation_to_install(plugins, plugin):
    plugin("acme 1.0", arbor_trainers=lambda: {"real": ANY})
    with pytest.raises(ArborError, match=r"trainer 'mock' is not installed: pip install arbor-mock"):
        plugins.simulated_trainer()


def test_hook_arbor_job_event_cannot_reach_the_jobs(plugins, plugin):
    seen = []

    def bad(job, event):
        raise RuntimeError("mine")

    plugin("bad 1.0", arbor_job_event=bad)
    plugin("good 1.0", arbor_job_event=lambda event: seen.append(event.step))
    observers = Observers(plugins)
    view = JobView("ftjob-1", "mock", "m", "running")
    for step in range(3):
        observers.notify(view, MetricsEvent(step=step, total_steps=3, values={}))
    observers.close()
    until(lambda: len(seen) >= 3)
    assert seen == [0, 1, 2]


def test_a_plugin_that_hangs_loses_events_but_stops_nobody(plugins, plugin, monkeypatch):
    import threading

    monkeypatch.setattr("arbor_core.dispatch.observers.CAPACITY", 4)
    held = threading.Event()
    plugin("slow 1.0", arbor_job_event=lambda job: held.wait())
    observers = Observers(plugins)
    for step in range(50):
        observers.notify(JobView("ftjob-1", "mock", "m", "running"), MetricsEvent(step=step, total_steps=3, values={}))
    assert observers.dropped >= 40
    held.set()


def test_two_plugins_may_not_bring_one_name(plugins, plugin):
    plugin("acme 1.0", arbor_trainers=lambda: {"grpo": ANY})
    plugin("other 2.0", arbor_trainers=lambda: {"grpo": ANY})
    with pytest.raises(ArborError, match=r"'grpo' is brought by (acme 1.0|other 2.0) and by (other 2.0|acme 1.0)"):
        plugins.all("trainers")


@pytest.mark.parametrize(
    ("asked", "says"),
    [("acmee", "did you mean 'acme'"), ("dpo", "pip install arbor-dpo"), ("zzz", "installed: acme")],
)
def test_an_unknown_name_says_what_to_do(plugins, plugin, asked, says):
    plugin("acme 1.0", arbor_trainers=lambda: {"acme": ANY})
    with pytest.raises(ArborError, match=says):
        plugins.get("trainers", asked)


def test_a_method_finds_its_trainer_the_preferred_one_first(plugins, plugin):
    one, two = (Trainer(config=msgspec.Struct, entry="x:y", methods=("supervised",)) for _ in range(2))
    plugin("acme 1.0", arbor_trainers=lambda: {"one": one, "two": two})
    assert plugins.trainer_for("supervised") == "one"
    assert plugins.trainer_for("supervised", preferred="two") == "two"
    assert plugins.trainer_for("two") == "two"
    with pytest.raises(ArborError, match="pip install arbor-dpo"):
        plugins.trainer_for("dpo")


def write_plugin(folder: Path, name: str, code: str) -> None:
    """An installed distribution, made by hand."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[arbor]\n{name} = {name}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("raise SystemError('dead')", "SystemError: dead"),
        ("import arbor_core\n@arbor_core.hookimpl\ndef arbor_trainer(): return {}", "arbor_trainer"),
        ("import arbor_core\n@arbor_core.hookimpl\ndef arbor_routes(wrong): return []", "wrong"),
    ],
)
def test_a_broken_plugin_is_shown_and_stops_nobody(site, code, reason):
    write_plugin(site, "acme_broken", code)
    loaded = loading.load()
    assert reason in loaded.broken["acme-broken"]
    assert "fifo" in loaded.all("schedulers")


def test_a_hook_that_raises_when_asked_is_a_broken_plugin(site):
    write_plugin(site, "acme_late", "import arbor_core\n@arbor_core.hookimpl\ndef arbor_trainers(): return 1 / 0")
    loaded = loading.load()
    assert "ZeroDivisionError" in loaded.broken["acme-late"]
    assert "fifo" in loaded.all("schedulers")


def test_a_disabled_plugin_is_not_imported(site):
    write_plugin(site, "acme_off", "raise SystemError('imported')")
    assert "imported" in loading.load().broken["acme-off"]
    for name in ("acme_off", "acme-off"):  # the plugin's name, or its distribution's
        loaded = loading.load([name])
        assert "acme-off" in loaded.disabled
        assert "acme-off" not in loaded.broken
    with pytest.raises(ArborError, match="no plugin called nothing"):
        loading.load(["nothing"])


def test_every_hook_says_what_it_is_for():
    assert len(HOOKS) == 9
    for name in HOOKS:
        assert len(getattr(hookspecs, name).__doc__) > 40


def test_every_hook_has_a_test():
    sources = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    tested = " ".join(re.findall(r"def test_hook_(\w+)", sources))
    for name in HOOKS:
        assert name.removeprefix("arbor_") in tested, f"no test called test_hook_{name}"


def test_loading_every_plugin_imports_no_deep_learning_library():
    heavy = ["torch", "transformers", "trl", "peft", "vllm", "accelerate", "deepspeed"]
    code = "import sys; from arbor_core import plugins; plugins.load().all('trainers'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(heavy) & set(loaded)


def test_a_trainer_that_says_rollouts_is_understood_for_one_more_release():
    with pytest.warns(DeprecationWarning, match="input='rollouts'"):
        trainer = Trainer(config=msgspec.Struct, entry="acme:train", rollouts=True)
    assert trainer.input == "rollouts"
    with pytest.warns(DeprecationWarning, match="False is the default"):
        assert Trainer(config=msgspec.Struct, entry="acme:train", rollouts=False).input == "file"
