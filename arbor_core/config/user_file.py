"""`~/.arbor/config.yaml`, laid between `conf/serve.yaml` and the command line; and keys that had another name before.

The keys of the original Arbor are read in the file; Arbor's own earlier ones everywhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.types import ConfigError

from .convert import load_yaml
from .settings import ServeConfig

log = logging.getLogger(__name__)

PATTERNS = ("inference.models", "inference.replicas")
"""Mappings whose keys are patterns of names: they have dots and slashes, as no key of Hydra's has."""


def arbor_home() -> Path:
    """`~/.arbor`, or where ARBOR_HOME says."""
    return Path(os.environ.get("ARBOR_HOME") or "~/.arbor").expanduser()


def overrides(environ: Mapping[str, str]) -> list[str]:
    """What comes before the user's own arguments, as Hydra overrides: a later one wins.

    Raises:
        ConfigError: the file is not YAML, or has a key that means nothing.
    """
    before = []
    if environ.get("ARBOR_MOCK_GPU", "") not in ("", "0"):
        before += ["allocator=mock", "inference.default=mock"]
    path = arbor_home() / "config.yaml"
    if path.exists():
        values = translated(load_yaml(path))
        known = [field.name for field in msgspec.structs.fields(ServeConfig)]
        for key in values:
            if key not in known:
                close = get_close_matches(key, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else f"; expected one of {', '.join(known)}"
                raise ConfigError(f"{path}: unknown key '{key}'{hint}")
        before += list(flat(values))
    return before


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """The original Arbor's keys as ours; ours as they are."""
    ours = with_new_keys(values)
    gpu: dict[str, Any] = dict(ours.pop("gpu", None) or {})
    if ids := ours.pop("gpu_ids", None):  # one list for both: the last serves, as with `gpu.train: null`
        gpu.setdefault("train", ids[:-1] or ids)
        gpu.setdefault("inference", ids[-1:])
    if (training := ours.pop("training", None)) is not None:
        if not isinstance(training, Mapping) or set(training) != {"gpu_ids"}:
            raise ConfigError(f"config.yaml: 'training' may hold gpu_ids and nothing else, but it is {training!r}")
        gpu["train"] = training.get("gpu_ids")
    inference = ours.get("inference")
    if isinstance(inference, Mapping) and "gpu_ids" in inference:
        gpu["inference"] = inference["gpu_ids"]
        ours["inference"] = {key: value for key, value in inference.items() if key != "gpu_ids"}
    if gpu:
        ours["gpu"] = gpu
    if "storage_path" in ours:
        ours["storage"] = ours.pop("storage_path")
    if "inactivity_timeout" in ours:
        limits = ours.get("limits")
        ours["limits"] = {**(limits or {}), "engine_idle_seconds": ours.pop("inactivity_timeout")}
    return ours


def with_new_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose keys may be of an earlier Arbor, with the keys of this one: `launcher: warm` is `start: warm`, and
    `inference: NAME` is `inference: {default: NAME}`."""
    found = dict(values)
    if isinstance(found.get("inference"), str):
        found["inference"] = {"default": found["inference"]}
    if found.get("launcher") in ("warm", "cold"):
        found["start"] = found.pop("launcher")
        warn_of_launcher()
    return found


def with_new_key(argument: str) -> str:
    """A word of the command line, in the same way."""
    if chosen := re.fullmatch(r"(\+{0,2})inference=([^{].*)", argument):
        return f"{chosen[1]}inference.default={chosen[2]}"
    old = re.fullmatch(r"(\+{0,2})launcher=(['\"]?)(warm|cold)\2", argument)
    if old is None:
        return argument
    warn_of_launcher()
    return f"{old[1]}start={old[3]}"


@cache
def warn_of_launcher() -> None:
    """Once in a process, wherever the old key stands."""
    log.warning("the key 'launcher' is called 'start' now: write start=warm or start=cold")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested values as `a.b=value`; `trainer: NAME`, `launcher: NAME`, `launcher: {name: NAME}` choose from a group."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name == "trainer" and isinstance(value, str):
            yield f"+trainer={value}"
        elif name in ("launcher", "launcher.name") and isinstance(value, str):
            yield f"launcher={value}"
        elif name in PATTERNS and isinstance(value, Mapping):
            yield f"++{name}={literal(value)}"
        elif isinstance(value, Mapping) and value:
            added = {"trainers": "+", "engine": "+", "engines": "+", "launcher.env": "++"}.get(name, "")
            yield from (f"{added}{line}" for line in flat(value, f"{name}."))
        else:
            yield f"{name}={literal(value)}"


def literal(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, list):
        return "[" + ",".join(literal(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key_literal(str(key))}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{quoted}'"
    return json.dumps(value)


def key_literal(key: str) -> str:
    """A key of a mapping in the grammar of Hydra's overrides.

    Raises:
        ConfigError: that grammar cannot write it.
    """
    if unknown := re.search(r"[^\w/.*?$%@|+ \t\\()\[\]{}:=,-]", key):
        raise ConfigError(f"'{key}' cannot be a key in config.yaml: it holds {unknown[0]!r}")
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", key)
