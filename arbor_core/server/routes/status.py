"""`/health`, `/ready`, and `/v1/arbor`: the state of the server, its plugins and its trainers' configuration."""

from __future__ import annotations

import msgspec
from litestar import Response, get

from arbor_core.application.status import PluginList
from arbor_core.application.system import Arbor
from arbor_core.server import schemas
from arbor_core.server.http.auth import ANY
from arbor_core.server.http.openapi import described


@get(
    "/health",
    operation_id="getHealth",
    opt=described("Whether the server works: `ok`, or `degraded` while a device is lost.", public=True),
)
async def health(arbor: Arbor) -> schemas.Health:
    return schemas.Health(arbor.status.health())


@get("/ready", operation_id="getReady", opt=described("Whether the server takes requests.", public=True))
async def ready() -> schemas.Health:
    return schemas.Health("ready")  # a request can only get here once the lifespan has begun


@get("/v1/arbor/plugins", operation_id="listPlugins", opt=described("List plugins: what each brings, what is broken."))
async def list_plugins(arbor: Arbor) -> PluginList:
    return arbor.status.list_plugins()


@get(
    "/v1/arbor/trainers/{name:str}/schema",
    operation_id="getTrainerSchema",
    opt=described("JSON Schema of a trainer's configuration, with this server's defaults.", scopes=ANY),
)
async def trainer_schema(name: str, arbor: Arbor) -> Response[bytes]:
    return Response(msgspec.json.encode(arbor.status.trainer_schema(name)), media_type="application/json")


ROUTES = [health, ready, list_plugins, trainer_schema]
