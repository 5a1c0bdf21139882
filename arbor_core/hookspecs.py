"""The hooks a plugin may implement. A hook returns things by name; YAML picks a name (`scheduler: fifo`).

Hooks that return a mapping are called once in each process that loads the plugins (`arbor_core.plugins.load`): the
server when it starts, before it listens, and every command of `arbor`. They import nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from .types import (
        AllocatorFactory,
        BackendFactory,
        Event,
        ExecutorFactory,
        JobView,
        Launcher,
        SchedulerFactory,
        Services,
        Trainer,
    )

hookspec, hookimpl = HookspecMarker("arbor"), HookimplMarker("arbor")


@hookspec
def arbor_trainers() -> Mapping[str, Trainer]:  # type: ignore[empty-body]
    """Training methods. Called when the plugins are loaded, by the server and by `arbor`: name the training function,
    do not import it. A job's processes import it."""


@hookspec
def arbor_schedulers() -> Mapping[str, SchedulerFactory]:  # type: ignore[empty-body]
    """Ways to choose which queued job starts next. Called when the plugins are loaded; the server calls the factory
    that the key `scheduler` names once, when it starts. `plan(snapshot)` must be pure."""


@hookspec
def arbor_allocators() -> Mapping[str, AllocatorFactory]:  # type: ignore[empty-body]
    """Ways to grant devices. Called when the plugins are loaded; the server calls the factory that the key `allocator`
    names once, when it starts. A claim is granted whole or not at all."""


@hookspec
def arbor_executors() -> Mapping[str, ExecutorFactory]:  # type: ignore[empty-body]
    """Ways to start attempts and to find them again after the server restarted. Called when the plugins are loaded; the
    server calls the factory that the key `executor` names once, when it starts."""


@hookspec
def arbor_launchers() -> Mapping[str, Launcher]:  # type: ignore[empty-body]
    """Ways to start the ranks of a job with several devices. Called when the plugins are loaded; the server calls the
    command of the one that `launcher` names before each attempt of such a job. The names `warm` and `cold` are those of
    `start`."""


@hookspec
def arbor_inference_backends() -> Mapping[str, BackendFactory]:  # type: ignore[empty-body]
    """Ways to serve a model: each starts engine processes that speak OpenAI's HTTP API on loopback. Called when the
    plugins are loaded; the server calls the factory that the key `inference` names once, when it starts."""


@hookspec
def arbor_tiny_models() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Small base models for trying things out: by name the `package.module:function` that is called with the path of a
    directory and writes config, weights and tokenizer into it. Called when the plugins are loaded; `arbor tiny-model`
    imports and calls the function."""


@hookspec
def arbor_routes(services: Services) -> Sequence[Any]:  # type: ignore[empty-body]
    """Litestar route handlers to add to the API. Called once by the server, when it starts."""


@hookspec
def arbor_job_event(job: JobView, event: Event) -> None:
    """Called by the server for every event of every job, when it is stored, on a thread with a bounded queue: an
    exception or a hang goes no further."""
