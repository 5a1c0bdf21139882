"""`/health`, `/ready`, and `/v1/arbor`: the state of the server, its plugins and its trainers' configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Response, get

from arbor_core.application.system import Arbor
from arbor_core.plugins import KINDS
from arbor_core.server import schemas
from arbor_core.server.http.auth import ANY
from arbor_core.server.http.openapi import described
from arbor_core.types import not_found


@get(
    "/health",
    operation_id="getHealth",
    opt=described("Whether the server works: `ok`, or `degraded` while a device is lost.", public=True),
)
async def health(arbor: Arbor) -> schemas.Health:
    return schemas.Health("degraded" if any(arbor.allocator.lost().values()) else "ok")


@get("/ready", operation_id="getReady", opt=described("Whether the server takes requests.", public=True))
async def ready() -> schemas.Health:
    return schemas.Health("ready")  # a request can only get here once the lifespan has begun


@get("/v1/arbor/plugins", operation_id="listPlugins", opt=described("List plugins: what each brings, what is broken."))
async def list_plugins(arbor: Arbor) -> schemas.PluginList:
    plugins = arbor.plugins
    brings: dict[str, dict[str, list[str]]] = {label: {} for label, _ in plugins.manager.list_name_plugin()}
    for kind in KINDS:
        for name in plugins.all(kind):
            brings.setdefault(plugins.owner(kind, name), {}).setdefault(kind, []).append(name)
    return schemas.PluginList(
        [
            *(schemas.PluginInfo(label, kinds) for label, kinds in sorted(brings.items())),
            *(schemas.PluginInfo(name, {}, broken=why) for name, why in sorted(plugins.broken.items())),
            *(schemas.PluginInfo(name, {}, disabled=True) for name in sorted(plugins.disabled)),
        ]
    )


@get(
    "/v1/arbor/trainers/{name:str}/schema",
    operation_id="getTrainerSchema",
    opt=described("JSON Schema of a trainer's configuration, with this server's defaults.", scopes=ANY),
)
async def trainer_schema(name: str, arbor: Arbor) -> Response[bytes]:
    defaults = arbor.trainers.get(name)
    if defaults is None:
        raise not_found("trainer", name, "trainer_not_found", "name")
    return Response(
        msgspec.json.encode(schema(defaults.trainer.config, defaults.values)), media_type="application/json"
    )


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


ROUTES = [health, ready, list_plugins, trainer_schema]
