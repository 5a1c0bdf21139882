"""Every error leaves in OpenAI's envelope, with all four keys, whatever raised it."""

from __future__ import annotations

import errno
import logging
import sqlite3
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap, Scope

from arbor_core import ids
from arbor_core.config.convert import explained
from arbor_core.process.resources import DISK_FULL_ERRNOS
from arbor_core.storage.synced_log import LogDamagedError
from arbor_core.types import CLOSE, NO_RETRY, ApiError, ArborError, ConfigError, envelope, not_found

__all__ = ["CLOSE", "HANDLERS", "NO_RETRY", "ApiError", "envelope", "not_found", "request_id", "response"]

log = logging.getLogger(__name__)
PATH_CHARS = 200


def response(error: ApiError) -> Response[bytes]:
    """The HTTP answer to a request that failed."""
    return Response(envelope(error), status_code=error.status, headers=error.headers, media_type="application/json")


def request_id(scope: Scope) -> str:
    """The id of a request: in the `x-request-id` header of its response, and in the log."""
    state: dict[str, Any] = scope["state"]
    return str(state.get("request_id") or state.setdefault("request_id", ids.new("req_")))


def _api(request: Request[Any, Any, Any], error: ApiError) -> Response[bytes]:
    return response(error)


def _config(request: Request[Any, Any, Any], error: ConfigError) -> Response[bytes]:
    return response(ApiError(400, str(error), error.code, error.path))


def _arbor(request: Request[Any, Any, Any], error: ArborError) -> Response[bytes]:
    return response(ApiError(400, str(error), "invalid_request"))


def _damaged(request: Request[Any, Any, Any], error: LogDamagedError) -> Response[bytes]:
    """Not the client's fault, and repeating the request does not help."""
    log.error("%s %s: %s", request.method, request.scope["path"], error)
    message = "What this job has stored is damaged; the server's log says where."
    return response(ApiError(500, message, "storage_damaged", headers=NO_RETRY))


def _http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """What Litestar raises itself: no such route, wrong method, body too large, a plugin route's parameters."""
    where = f"{request.method} {request.scope['path'][:PATH_CHARS]}"
    status, headers = error.status_code, dict(error.headers or {})
    if status == 404:
        found = ApiError(404, f"Unknown request URL: {where}. The routes are at /docs.", "unknown_url")
    elif status == 405:
        allowed = headers.get("allow", "other methods")
        message = f"Not allowed to {where}; this URL answers to {allowed}."
        found = ApiError(405, message, "method_not_allowed", headers=headers)
    elif status == 413:
        message = "The request body is too large (limits.json_bytes)."
        found = ApiError(413, message, "request_too_large", headers=CLOSE)
    elif status >= 500 and error.detail != GONE:
        return _unknown(request, error)
    elif status >= 500:
        log.info("%s: %s", where, GONE)
        found = ApiError(400, "The client went away while it sent its request.", "request_aborted")
    else:
        found = _refused(error)
    return response(found)


GONE = "client disconnected prematurely"
"""What Litestar says, with status 500, when a body ends too early."""


def _refused(error: HTTPException) -> ApiError:
    """A plugin route's parameters that Litestar refused: the first that is wrong, in the words of our own routes."""
    faults = [fault for fault in error.extra or () if isinstance(fault, dict)]
    if not faults:
        return ApiError(error.status_code, error.detail, "invalid_request", headers=error.headers)
    key = str(faults[0].get("key", "data"))
    path = "$" if key == "data" else f"$.{key}"
    fault = explained(f"{faults[0].get('message')} - at `{path}`", None, "")
    return ApiError(error.status_code, str(fault), fault.code, fault.path or None)


def _busy(request: Request[Any, Any, Any], error: sqlite3.OperationalError) -> Response[bytes]:
    """A database that somebody else holds: nothing was written, so the request may come again. Or a full disk."""
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return _full(": nothing was changed")
    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
        return _unknown(request, error)
    message = "The database is busy. Try again in a moment."
    return response(ApiError(503, message, "database_busy", headers={"retry-after": "2"}))


def _full(what: str) -> Response[bytes]:
    message = f"The server's disk is full{what}. Make room on it, then try again."
    return response(ApiError(507, message, "insufficient_storage", headers=NO_RETRY))


def _exhausted(request: Request[Any, Any, Any], error: OSError) -> Response[bytes]:
    """A disk that is full, or a process that may open nothing more or get no more memory: for a while, unlike other
    faults of ours."""
    if error.errno in DISK_FULL_ERRNOS:
        log.error("%s %s: %s", request.method, request.scope["path"], error)
        return _full("")
    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return _unknown(request, error)
    log.error("%s %s: %s", request.method, request.scope["path"], error)
    message = "The server is at the limit of what it may open. Try again in a moment."
    return response(ApiError(503, message, "server_overloaded", headers={"retry-after": "2"}))


def _unknown(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A fault of ours: the whole story into the log, its id to the client. Repeating the request would not help."""
    if isinstance(error, RecursionError | UnicodeDecodeError) and _litestar_decodes(request):
        return response(ApiError(400, "We could not parse the JSON body of your request.", "invalid_json"))
    name = request_id(request.scope)
    log.error("%s %s %s failed", name, request.method, request.scope["path"], exc_info=error)
    message = f"The server had an error while it worked on your request. Its log has more under {name}."
    return response(ApiError(500, message, "internal_error", headers=NO_RETRY))


def _litestar_decodes(request: Request[Any, Any, Any]) -> bool:
    """Whether the route has Litestar decode its body, as a plugin's may: it lets these two errors through."""
    route = request.scope.get("route_handler")
    return route is not None and "data" in route.parsed_fn_signature.parameters


HANDLERS: ExceptionHandlersMap = {
    ApiError: _api,
    ConfigError: _config,
    LogDamagedError: _damaged,
    ArborError: _arbor,
    HTTPException: _http,
    sqlite3.OperationalError: _busy,
    OSError: _exhausted,
    Exception: _unknown,
}


def shutting_down() -> ApiError:
    """Row 114: the next server answers."""
    message = "The server is shutting down. Repeat the request when it is there again."
    return ApiError(503, message, "server_shutting_down", headers={"retry-after": "10"})
