"""The application: routes, errors, keys and request ids put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from litestar import Litestar
from litestar.di import Provide
from litestar.types import Message, Scope

from arbor_core.application.services import ServerServices
from arbor_core.application.system import Arbor
from arbor_core.config.api_keys import entries

from .http import openapi
from .http.auth import guard, owner
from .http.errors import HANDLERS, request_id
from .routes import chat, completions, devices, files, fine_tuning, models, samples, status, uploads

ROUTE_MODULES = (status, chat, completions, files, uploads, fine_tuning, samples, devices, models, openapi)


def create_app(arbor: Arbor, on_failure: Callable[[BaseException], object] | None = None) -> Litestar:
    """The ASGI application that serves one Arbor.

    Args:
        on_failure: As for `Arbor.running`.
    """
    auth = arbor.settings.auth

    def provide_arbor() -> Arbor:
        return arbor

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with arbor.running(on_failure):
            yield

    return Litestar(
        route_handlers=[*(route for module in ROUTE_MODULES for route in module.ROUTES), *plugin_routes(arbor)],
        dependencies={"arbor": Provide(provide_arbor, sync_to_thread=False), "owner": Provide(owner)},
        exception_handlers=HANDLERS,
        guards=[guard(entries(auth.keys), arbor.settings.limits, insecure=auth.insecure)],
        lifespan=[lifespan],
        before_send=[add_request_id],
        request_max_body_size=arbor.settings.limits.json_bytes,
        openapi_config=None,
        logging_config=None,
    )


def plugin_routes(arbor: Arbor) -> list[Any]:
    """The route handlers that plugins bring."""
    services = ServerServices(arbor)
    return [route for routes in arbor.plugins.manager.hook.arbor_routes(services=services) for route in routes]


async def add_request_id(message: Message, scope: Scope) -> None:
    """Name the request in its response, whatever the response is."""
    if message["type"] == "http.response.start":
        headers = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
        message["headers"] = [*headers, (b"x-request-id", request_id(scope).encode())]
