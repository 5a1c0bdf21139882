"""Configuration: YAML composed by Hydra, typed by msgspec. The only file that knows Hydra's classes.

Hydra composes the command line, once, at start. What a client sends never reaches it: JSON is laid over the composed
defaults as plain data, so `${...}` in a request stays a string.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hydra import compose
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins as HydraPlugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from arbor_core.plugins import installed
from arbor_core.types import ArborError, ConfigError


def core_config_dir() -> Path:
    """`conf/` inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def arbor_home() -> Path:
    """`~/.arbor`, or where ARBOR_HOME says."""
    return Path(os.environ.get("ARBOR_HOME") or "~/.arbor").expanduser()


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


def load_yaml(path: Path) -> dict[str, Any]:
    """One YAML file as Hydra reads it (`yaml.safe_load` would read 1e-5 as text).

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml and omegaconf raise many kinds
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        what = f"line {mark.line + 1}: {problem}" if mark and problem else str(error).splitlines()[0]
        raise ConfigError(f"{path}: {what}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return plain(loaded)


def defaults(group: str, name: str) -> dict[str, Any]:
    """The plain contents of `<group>/<name>.yaml` on the search path; empty where no plugin brings it.

    About 100 ms: call it at start, not in a request.
    """
    found = [
        folder / group / f"{name}.yaml"
        for folder in (core_config_dir(), *(p.config_dir for p in installed()))
        if folder and (folder / group / f"{name}.yaml").is_file()
    ]
    if not found:
        return {}
    cfg = compose(overrides=[f"+{group}@_arbor={name}"])
    return cast("dict[str, Any]", plain(cfg)["_arbor"])


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, key by key, as plain data."""
    both = dict(base)
    for key, value in over.items():
        mine = both.get(key)
        both[key] = merged(mine, value) if isinstance(value, Mapping) and isinstance(mine, Mapping) else value
    return both
