"""Configuration composed from YAML: all that Arbor uses of Hydra, and the only module that knows its classes.

Hydra composes the command line, once, at start. What a client sends never reaches it: JSON is laid over the composed
defaults as plain data, so `${...}` in a request stays a string. Nothing here needs an initialised Hydra: it is
initialised where it is needed, and left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins as HydraPlugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from arbor_core.plugins import installed
from arbor_core.types import ArborError

from .convert import load_yaml, typed
from .settings import ServeConfig
from .user_file import with_new_keys

HYDRA_VERSION = "1.3"
"""Whose defaults Hydra keeps to."""
LAUNCHER = "torchrun"
"""The default in conf/serve.yaml."""


def core_config_dir() -> Path:
    """`conf/` inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


class PluginConfigs(SearchPathPlugin):
    """Puts every installed plugin's `conf/` on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
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


# By code and for this program only: the `hydra_plugins` namespace would reach every Hydra program in the environment.
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
    """The settings of `arbor-serve OVERRIDES`, without the command line. `~/.arbor/config.yaml` is not read.

    Raises:
        ConfigError: a value that the settings do not take.
        hydra.errors.HydraException: a key that they do not have, or an override that cannot be read.
    """
    return settings_of(_composed("serve", overrides))


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
    return cast("dict[str, Any]", plain(_composed(None, [f"+{group}@_arbor={name}"]))["_arbor"])


def _composed(config_name: str | None, overrides: Sequence[str]) -> DictConfig:
    """Have Hydra compose, within the program's own initialisation if it has one."""
    initialised = (
        nullcontext()
        if GlobalHydra.instance().is_initialized()
        else hydra.initialize_config_dir(str(core_config_dir()), version_base=HYDRA_VERSION)
    )
    with initialised:
        return hydra.compose(config_name, overrides=list(overrides))
