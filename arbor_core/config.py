"""Configuration: YAML composed by Hydra, typed by msgspec. The only file that knows Hydra's classes.

Hydra composes the command line, once, at start. What a client sends never reaches it: JSON is laid over the composed
defaults as plain data, so `${...}` in a request stays a string.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from hydra import compose
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins as HydraPlugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from msgspec import Meta
from omegaconf import DictConfig, OmegaConf

from .keys import ApiKey, Key, Name, entries
from .plugins import installed
from .types import ArborError, ConfigError

Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]
Index = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]


Span = Annotated[str, Meta(pattern=r"^\d{1,6}-\d{1,6}$")]
"""`0-7`: the devices 0 to 7."""


class GpuConfig(msgspec.Struct, forbid_unknown_fields=True):
    train: list[Index | Span] | None
    inference: list[Index | Span] | None

    def __post_init__(self) -> None:
        for key, ids in (("train", self.train_ids), ("inference", self.inference_ids)):
            if ids and len(set(ids)) < len(ids):
                raise ValueError(f"a device is named twice in '{key}': {ids}")

    @property
    def train_ids(self) -> list[int] | None:
        return None if self.train is None else spread(self.train)

    @property
    def inference_ids(self) -> list[int] | None:
        return None if self.inference is None else spread(self.inference)


def spread(devices: Sequence[int | str]) -> list[int]:
    """The number of each device, those of spans too.

    Raises:
        ValueError: a span that ends before it begins.
    """
    ids: list[int] = []
    for entry in devices:
        first, _, last = str(entry).partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ValueError(f"'{entry}' names no device: write it as FIRST-LAST")
        ids += span
    return ids


class ModelsConfig(msgspec.Struct, forbid_unknown_fields=True):
    dirs: list[Path]
    allow: list[str]


class AuthConfig(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key | ApiKey]
    insecure: bool

    def __post_init__(self) -> None:
        self.keys = [*entries(self.keys)]  # hashed from here on


class PluginsConfig(msgspec.Struct, forbid_unknown_fields=True):
    disabled: list[str]


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True):
    upload_bytes: Count
    json_bytes: Count
    head_seconds: Seconds
    upload_idle_seconds: Seconds
    upload_bytes_per_second: Annotated[float, Meta(ge=0)]
    upload_seconds: Seconds
    free_bytes: Bytes
    queued_jobs: Annotated[int, Meta(ge=0)]
    requests_per_second: Rate | None
    inference_requests: Count | None
    engine_idle_seconds: Seconds
    engines: Count
    attempts: Count
    heartbeat_seconds: Seconds
    start_seconds: Seconds
    engine_heartbeat_seconds: Seconds
    room_seconds: Seconds
    shutdown_seconds: Seconds


class ServeConfig(msgspec.Struct, forbid_unknown_fields=True):
    """`conf/serve.yaml`, typed. The comment above each key is there."""

    host: str
    port: Annotated[int, Meta(ge=0, le=65535)]
    storage: Path
    models: ModelsConfig
    gpu: GpuConfig
    scheduler: str
    allocator: str
    executor: str
    launcher: Literal["warm", "cold"]
    inference: str
    organization: Name
    threads: Count | None
    auth: AuthConfig
    plugins: PluginsConfig
    limits: LimitsConfig
    accelerate_config: Path | None
    trainer: dict[str, Any] | None = None
    trainers: dict[str, dict[str, Any]] = {}
    engine: dict[str, Any] = {}


def core_config_dir() -> Path:
    """`conf/` inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
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
