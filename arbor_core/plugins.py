"""Finds, loads and looks up plugins. The only file that knows about entry points."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pluggy

from . import hookspecs
from .types import ArborError

KINDS = ("trainers", "schedulers", "allocators", "executors", "launchers", "inference_backends")
"""What a plugin brings by name, for the server."""
COMMAND_KINDS = ("tiny_models",)
"""What it brings for the commands of `arbor` alone."""
GROUP = "arbor"  # [project.entry-points.arbor]
KNOWN = {
    ("trainers", "sft"): "arbor-sft",
    ("trainers", "dpo"): "arbor-dpo",
    ("trainers", "grpo"): "arbor-grpo",
    ("trainers", "mm_grpo"): "arbor-mm-grpo",
    ("trainers", "mock"): "arbor-mock",
    ("inference_backends", "transformers"): "arbor-transformers",
    ("inference_backends", "vllm"): "arbor-vllm",
    ("inference_backends", "mock"): "arbor-mock",
    ("allocators", "mock"): "arbor-mock",
    ("allocators", "ray"): "arbor-ray",
    ("executors", "ray"): "arbor-ray",
    ("tiny_models", "tiny"): "arbor-sft",
}
"""What to install for a name that is not there."""
RESERVED = {
    ("launchers", "accelerate"): "there is no launcher 'accelerate' yet: accelerate_config=FILE starts ranks with it",
    ("launchers", "deepspeed"): "there is no launcher 'deepspeed' yet: accelerate_config=FILE may choose DeepSpeed",
}
"""Names that will be brought later, and what does for them now."""
METHOD_PACKAGES = {"supervised": "arbor-sft", "dpo": "arbor-dpo", "reinforcement": "arbor-grpo"}
"""What to install for an OpenAI method that no trainer answers to."""


@dataclass(frozen=True)
class Installed:
    """An installed plugin that has not been imported."""

    entry_point: EntryPoint

    @property
    def name(self) -> str:
        return self.entry_point.name

    @property
    def distribution(self) -> str:
        return self.entry_point.dist.name if self.entry_point.dist else self.name

    @property
    def label(self) -> str:
        dist = self.entry_point.dist
        return f"{dist.name} {dist.version}" if dist else self.name

    @property
    def config_dir(self) -> Path | None:
        """`conf/` inside the plugin's package, found without importing it."""
        try:
            spec = find_spec(self.entry_point.module.partition(".")[0])
        except (ImportError, ValueError):
            return None
        folders = [Path(folder) / "conf" for folder in (spec and spec.submodule_search_locations) or ()]
        return next((folder for folder in folders if folder.is_dir()), None)


def installed() -> list[Installed]:
    """Every plugin in this environment, by name."""
    return [Installed(entry_point) for entry_point in sorted(entry_points(group=GROUP), key=lambda ep: ep.name)]


@dataclass
class Plugins:
    """The loaded plugins, what failed to load and why, and which the operator disabled."""

    manager: pluggy.PluginManager
    broken: dict[str, str] = field(default_factory=dict)
    disabled: list[str] = field(default_factory=list)

    @cached_property
    def _found(self) -> dict[str, dict[str, tuple[Any, str]]]:
        return {kind: self._collect(kind) for kind in (*KINDS, *COMMAND_KINDS)}

    def _collect(self, kind: str) -> dict[str, tuple[Any, str]]:
        found: dict[str, tuple[Any, str]] = {}
        for impl in getattr(self.manager.hook, f"arbor_{kind}").get_hookimpls():
            try:
                brought = dict(impl.function())
            except Exception as error:  # a stranger's hook may raise anything
                distribution = impl.plugin_name.partition(" ")[0]
                self.broken[distribution] = f"{impl.plugin_name}: {type(error).__name__}: {error} (arbor_{kind})"
                continue
            for name, thing in brought.items():
                if name in found:
                    owner = found[name][1]
                    raise ArborError(
                        f"{singular(kind)} '{name}' is brought by {owner} and by {impl.plugin_name}: "
                        f"uninstall one, or start with plugins.disabled=[{impl.plugin_name.partition(' ')[0]}]"
                    )
                found[name] = (thing, impl.plugin_name)
        return found

    def all(self, kind: str) -> dict[str, Any]:
        """Everything of one kind ("trainers", "schedulers", ...), by name.

        Raises:
            ArborError: two plugins bring one name; both are named.
        """
        return {name: thing for name, (thing, _) in self._found[kind].items()}

    def owner(self, kind: str, name: str) -> str:
        """The distribution and version that brought a name."""
        return self._found[kind][name][1]

    def get(self, kind: str, name: str) -> Any:
        """One thing by name.

        Raises:
            ArborError: there is none; the message says what to install or which name is near.
        """
        known = self._found[kind]
        if name in known:
            return known[name][0]
        raise ArborError(self._missing(kind, name, known))

    def _missing(self, kind: str, name: str, known: Collection[str]) -> str:
        what = f"{singular(kind)} '{name}'"
        if reserved := RESERVED.get((kind, name)):
            return reserved
        package = KNOWN.get((kind, name))
        if package and package in self.broken:
            return f"{what} is installed but does not load: {self.broken[package]}"
        if package and package in self.disabled:
            return f"{what} is brought by {package}, which plugins.disabled blocks"
        if package:
            return f"{what} is not installed: pip install {package}"
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"installed: {', '.join(sorted(known)) or 'none'}"
        return f"no {singular(kind)} called '{name}'; {hint}"

    def simulated_trainer(self) -> str:
        """The name of the first trainer that is a simulation, for a server without devices (ARBOR_MOCK_GPU).

        Raises:
            ArborError: none is installed; the message names a package.
        """
        trainers = self.all("trainers")
        name = next((name for name, trainer in trainers.items() if trainer.simulated), None)
        if name is None:
            raise ArborError(self._missing("trainers", "mock", trainers))
        return name

    def trainer_for(self, method: str, preferred: str | None = None) -> str:
        """The name of the trainer that answers to an OpenAI `method.type` (or to its own name).

        The preferred one comes first, then another of the plugin that brings it, then the one of that name.

        Raises:
            ArborError: none is installed; the message names the package.
        """
        trainers = self.all("trainers")
        names = [name for name, trainer in trainers.items() if method == name or method in trainer.methods]
        if preferred in names:
            return str(preferred)
        brothers = [
            name for name in names if preferred and self.owner("trainers", name) == self.owner("trainers", preferred)
        ]
        if names:
            return method if method in (brothers or names) else (brothers or names)[0]
        if package := METHOD_PACKAGES.get(method):
            reason = self.broken.get(package)
            raise ArborError(
                f"method '{method}' is installed but does not load: {reason}"
                if reason
                else f"method '{method}' is not installed on this server: pip install {package}"
            )
        raise ArborError(self._missing("trainers", method, trainers))


def singular(kind: str) -> str:
    return kind[:-1].replace("_", " ")


def new_manager() -> pluggy.PluginManager:
    """A manager that knows the hooks and no plugin."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    return manager


def load(disabled: Collection[str] = ()) -> Plugins:
    """Import every installed plugin but those in `disabled` (by plugin or distribution name).

    A plugin that fails to import is set aside in `broken`, under its distribution's name; it is never fatal.

    Raises:
        ArborError: two plugins bring one name, or `disabled` names nothing that is installed.
    """
    plugins = Plugins(new_manager())
    unknown = set(disabled)
    for plugin in installed():
        if {plugin.name, plugin.distribution} & set(disabled):
            unknown -= {plugin.name, plugin.distribution}
            plugins.disabled.append(plugin.distribution)
            continue
        try:
            plugins.manager.register(plugin.entry_point.load(), name=plugin.label)
            plugins.manager.check_pending()
        except Exception as error:  # a stranger's import may raise anything
            if plugins.manager.has_plugin(plugin.label):
                plugins.manager.unregister(name=plugin.label)
            plugins.broken[plugin.distribution] = f"{plugin.label}: {type(error).__name__}: {error}"
    if unknown:
        names = ", ".join(plugin.name for plugin in installed())
        raise ArborError(f"plugins.disabled: no plugin called {', '.join(sorted(unknown))}; installed: {names}")
    plugins.all("trainers")  # two plugins bringing one name: say so at start, not at the first request
    return plugins
