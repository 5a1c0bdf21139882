"""Configuration composed from YAML: all that Arbor uses of Hydra, and the only module that knows its classes.

Hydra composes the command line, once, at start. What a client sends never reaches it: JSON is laid over the composed
defaults as plain data, so `${...}` in a request stays a string. Hydra's globals belong to the program that this is a
part of, a notebook say: whatever it has initialised Hydra with, or whether at all, does not matter here and stays so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins as HydraPlugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from arbor_core.plugins import installed
from arbor_core.types import ArborError

from .command_line import COMPLAINTS, as_overrides, complaint
from .convert import load_yaml, typed
from .settings import ServeConfig
from .user_file import with_new_keys

HYDRA_VERSION = "1.3"
"""Whose defaults Hydra keeps to."""
LAUNCHER = "torchrun"
"""The default in conf/serve.yaml."""
COMPOSING = threading.Lock()
"""Hydra has one version that it is compatible with, for all threads."""


def core_config_dir() -> Path:
    """`conf/` inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def add_plugins(search_path: ConfigSearchPath) -> None:
    """Put every installed plugin's `conf/` on a search path.

    Raises:
        ArborError: two bring one file.
    """
    owner: dict[Path, str] = {}
    core = core_config_dir()
    for label, folder in [("arbor-core", core), *((p.label, p.config_dir) for p in installed())]:
        if folder is None or (label != "arbor-core" and folder == core):
            continue
        for yaml in folder.rglob("*.yaml"):
            name = yaml.relative_to(folder)
            if name in owner:  # Hydra would take the first, silently
                raise ArborError(f"conf/{name} is brought by {owner[name]} and by {label}: uninstall one")
            owner[name] = label
        if folder != core:
            search_path.append(provider=label, path=f"file://{folder}")


class PluginConfigs(SearchPathPlugin):
    """The same, on the search path of whatever Hydra composes in this program."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        add_plugins(search_path)


def take_over_hydra() -> None:
    """Have this program's command line find what plugins bring: for `arbor-serve`, whose process is its own. The
    `hydra_plugins` namespace would reach every Hydra program in the environment."""
    HydraPlugins.instance().register(PluginConfigs)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Ordinary dicts and lists, interpolations resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def settings_of(cfg: DictConfig) -> ServeConfig:
    """The server's settings, as Hydra composed them.

    Raises:
        ConfigError: a key or a value that the settings do not have.
    """
    values = with_new_keys(plain(cfg))
    values.setdefault("launcher", defaults("launcher", LAUNCHER))  # it may have been `start`, which has its own key
    return typed(values, ServeConfig, where="")


def serve_settings(*overrides: str) -> ServeConfig:
    """The settings of `arbor-serve OVERRIDES`, without the command line. Neither `~/.arbor/config.yaml` nor
    ARBOR_MOCK_GPU is read; `+trainer=NAME` chooses the default method, as it does there.

    Raises:
        ArborError: a key that the settings do not have, a value that they do not take, or a word that cannot be read.
    """
    try:
        cfg, choices = _composed("serve", as_overrides(overrides))
        settings = settings_of(cfg)
    except COMPLAINTS as error:
        raise ArborError(complaint(error)) from None
    return msgspec.structs.replace(settings, default_trainer=choices.get("trainer"))


def defaults(group: str, name: str) -> dict[str, Any]:
    """The plain contents of `<group>/<name>.yaml` in the `conf/` of the core or a plugin; empty where there is no such
    file.

    A file with a `defaults:` list is composed by Hydra (about 100 ms): call this at start, not in a request.

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    folders = (core_config_dir(), *(plugin.config_dir for plugin in installed()))
    files = [folder / group / f"{name}.yaml" for folder in folders if folder]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return {}
    if "defaults" not in load_yaml(path, resolve=False):
        return load_yaml(path)
    cfg, _ = _composed(None, [f"+{group}@_arbor={name}"])
    return cast("dict[str, Any]", plain(cfg)["_arbor"])


def _composed(config_name: str | None, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str | None]]:
    """Have Hydra compose, apart from its globals; returns the configuration, and which file each group's is."""
    HydraPlugins.instance()  # knows the kinds of places that a search path may name
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    search_path.append("main", f"file://{core_config_dir()}")
    add_plugins(search_path)
    search_path.append("schema", "structured://")
    with _version_base():
        cfg = ConfigLoaderImpl(search_path).load_configuration(
            config_name, list(overrides), RunMode.RUN, from_shell=False
        )
    OmegaConf.set_struct(cfg, False)
    hydra = cfg.pop("hydra")
    return cfg, dict(hydra.runtime.choices)


@contextmanager
def _version_base() -> Iterator[None]:
    """Hydra's defaults are those of HYDRA_VERSION inside the block; the program around may want others."""
    with COMPOSING:
        base = version.VersionBase.instance()
        before = base.version_base
        version.setbase(HYDRA_VERSION)
        try:
            yield
        finally:
            base.version_base = before
