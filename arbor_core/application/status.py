"""How a server is and what it has: health, plugins, and the configuration of its trainers. Without HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import Struct

from arbor_core.plugins import KINDS, Plugins
from arbor_core.types import Allocator, not_found

from .submission import TrainerDefaults


class PluginInfo(Struct):
    """An installed plugin: what it brings by kind, or why it brings nothing."""

    name: str
    brings: dict[str, list[str]]
    broken: str | None = None
    disabled: bool = False


class PluginList(Struct):
    data: list[PluginInfo]
    object: Literal["list"] = "list"


@dataclass(frozen=True)
class ServerStatus:
    """What can be said of a server."""

    plugins: Plugins
    trainers: Mapping[str, TrainerDefaults]
    allocator: Allocator

    def health(self) -> str:
        """`ok`, or `degraded` while a device is lost."""
        return "degraded" if any(self.allocator.lost().values()) else "ok"

    def list_plugins(self) -> PluginList:
        """Every plugin: what it brings, or what is broken."""
        plugins = self.plugins
        brings: dict[str, dict[str, list[str]]] = {label: {} for label, _ in plugins.manager.list_name_plugin()}
        for kind in KINDS:
            for name in plugins.all(kind):
                brings.setdefault(plugins.owner(kind, name), {}).setdefault(kind, []).append(name)
        return PluginList(
            [
                *(PluginInfo(label, kinds) for label, kinds in sorted(brings.items())),
                *(PluginInfo(name, {}, broken=why) for name, why in sorted(plugins.broken.items())),
                *(PluginInfo(name, {}, disabled=True) for name in sorted(plugins.disabled)),
            ]
        )

    def trainer_schema(self, name: str) -> dict[str, Any]:
        """JSON Schema of a trainer's configuration, with this server's defaults.

        Raises:
            ApiError: 404.
        """
        defaults = self.trainers.get(name)
        if defaults is None:
            raise not_found("trainer", name, "trainer_not_found", "name")
        return schema(defaults.trainer.config, defaults.values)


def schema(config: type[msgspec.Struct], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A struct's JSON Schema, with the defaults that stand in YAML and not in the struct."""
    refs, components = msgspec.json.schema_components([config], schema_hook=lambda _: {}, ref_template="#/$defs/{name}")
    top = dict(components.pop(refs[0]["$ref"].rpartition("/")[2]))
    properties = {
        key: {**value, "default": defaults[key]} if key in defaults else value
        for key, value in top.get("properties", {}).items()
    }
    top["properties"] = properties
    top["required"] = [key for key in top.get("required", ()) if key not in defaults]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": components}
