"""The OpenAPI document, from the routes: ids and schemas are those of the handlers, so it is never out of date."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from litestar import Litestar, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from arbor_core.config.api_keys import Scope
from arbor_core.types.error_envelope import Error

from .auth import ADMIN
from .requests import AnyRequest

VERSION = "3.1.0"
REF = "#/components/schemas/{name}"
JSON = "application/json"
EVENTS = "text/event-stream"


def described(
    summary: str,
    *,
    query: type | None = None,
    body: type | None = None,
    form: dict[str, Any] | None = None,
    response: type | None = None,
    content: str = JSON,
    streams: bool = False,
    scopes: tuple[Scope, ...] = ADMIN,
    public: bool = False,
) -> dict[str, Any]:
    """The `opt` of a route, which the document and the guard read.

    Args:
        query: Struct of its query string.
        body: Struct of its JSON body, for a handler that reads the body itself.
        form: JSON Schema of its multipart body.
        response: Struct of its answer, where the handler's return annotation does not name it.
        content: Media type of its answer.
        streams: Whether its answer may be a stream of server-sent events instead.
        scopes: What a key must be for: any one of them will do, and an admin's always does.
        public: Whether it needs no key.
    """
    return {
        "summary": summary,
        "query": query,
        "body": body,
        "form": form,
        "response": response,
        "content": content,
        "streams": streams,
        "scopes": scopes,
        "public": public,
    }


def routes(app: Litestar) -> Iterator[tuple[str, str, HTTPRouteHandler]]:
    """Path, method and handler of every route that the document shows."""
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                for method in sorted(handler.http_methods - {"OPTIONS"}):
                    if handler.resolve_include_in_schema():
                        yield route.path_format, method.lower(), handler


def document(app: Litestar) -> dict[str, Any]:
    """The OpenAPI document of the whole API, plugins' routes included."""
    operations = list(routes(app))
    types = {type_ for _, _, handler in operations for type_ in _types(handler)} | {Error}
    ordered = sorted(types, key=lambda type_: (type_.__name__, type_.__module__))
    schemas, components = msgspec.json.schema_components(ordered, schema_hook=lambda _: {}, ref_template=REF)
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for path, method, handler in operations:
        paths.setdefault(path, {})[method] = _operation(path, handler, schema_of, components)
    return {
        "openapi": VERSION,
        "info": {
            "title": "Arbor",
            "version": core_version(),
            "description": "Post-training as a service. The routes that OpenAI has too answer to OpenAI's client.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


@cache
def core_version() -> str:
    """Version of the installed core."""
    return version("arbor-core")


def _types(handler: HTTPRouteHandler) -> Iterator[type]:
    for type_ in (handler.opt.get("query"), _body(handler), _answer(handler)):
        if type_ is not None:
            yield type_


def _body(handler: HTTPRouteHandler) -> type | None:
    data = handler.parsed_fn_signature.parameters.get("data")
    return _struct(handler.opt.get("body") or (data and data.annotation))


def _answer(handler: HTTPRouteHandler) -> type | None:
    return _struct(handler.opt.get("response") or handler.parsed_fn_signature.return_type.annotation)


def _struct(found: object) -> type | None:
    return found if isinstance(found, type) and issubclass(found, msgspec.Struct) else None


def _operation(
    path: str, handler: HTTPRouteHandler, schema_of: dict[type, dict[str, Any]], components: dict[str, Any]
) -> dict[str, Any]:
    opt = handler.opt
    operation: dict[str, Any] = {
        "operationId": handler.operation_id or handler.handler_name,
        "summary": opt.get("summary") or (handler.fn.__doc__ or "").partition("\n")[0],
        "parameters": [
            *({"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in _in_path(path)),
            *_query(opt.get("query"), schema_of, components),
        ],
    }
    if form := opt.get("form"):
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    elif (body := _body(handler)) is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_of[body]}}}
    answer = _answer(handler)
    good: dict[str, Any] = {opt.get("content") or JSON: {"schema": schema_of[answer] if answer else {}}}
    if opt.get("streams"):
        good[EVENTS] = {"schema": {}}
    operation["responses"] = {
        "200": {"description": "The answer.", "content": good},
        "default": {"description": "What went wrong.", "content": {JSON: {"schema": schema_of[Error]}}},
    }
    if not opt.get("public"):
        operation["security"] = [{"key": list(opt.get("scopes", ADMIN))}]
    return operation


def _in_path(path: str) -> list[str]:
    return re.findall(r"\{([^}:]+)", path)


def _query(type_: type | None, schema_of: dict[type, dict[str, Any]], components: dict[str, Any]) -> Iterator[Any]:
    if type_ is None:
        return
    schema = components[schema_of[type_]["$ref"].rpartition("/")[2]]
    for name, value in schema["properties"].items():
        yield {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": value}


@get(
    "/schema/openapi.json",
    operation_id="getOpenAPIDocument",
    opt=described("This document.", public=True),
    cache=False,
)
async def openapi(request: AnyRequest) -> Response[bytes]:
    state = request.app.state
    if "document" not in state:
        state["document"] = msgspec.json.encode(document(request.app))
    return Response(state["document"], media_type=JSON)


@get("/docs", include_in_schema=False, opt={"public": True})
async def docs() -> Response[bytes]:
    """The API's page. It fetches nothing from anywhere else."""
    return Response(_page(), media_type="text/html; charset=utf-8")


@cache
def _page() -> bytes:
    return (Path(__file__).parents[1] / "static" / "docs.html").read_bytes()


ROUTES = [openapi, docs]
