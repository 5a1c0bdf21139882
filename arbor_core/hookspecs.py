"""The hooks a plugin may implement. A hook returns things by name; YAML picks a name (`scheduler: fifo`)."""

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
        SchedulerFactory,
        Services,
        Trainer,
    )

hookspec, hookimpl = HookspecMarker("arbor"), HookimplMarker("arbor")


@hookspec
def arbor_trainers() -> Mapping[str, Trainer]:  # type: ignore[empty-body]
    """Training methods. Called once, in the server: name the training function, do not import it."""


@hookspec
def arbor_schedulers() -> Mapping[str, SchedulerFactory]:  # type: ignore[empty-body]
    """Ways to choose which queued job starts next. `plan(snapshot)` must be pure."""


@hookspec
def arbor_allocators() -> Mapping[str, AllocatorFactory]:  # type: ignore[empty-body]
    """Ways to grant devices. A claim is granted whole or not at all."""


@hookspec
def arbor_executors() -> Mapping[str, ExecutorFactory]:  # type: ignore[empty-body]
    """Ways to start attempts and to find them again after the server restarted."""


@hookspec
def arbor_inference_backends() -> Mapping[str, BackendFactory]:  # type: ignore[empty-body]
    """Ways to serve a model: each starts engine processes with an OpenAI-shaped face on loopback."""


@hookspec
def arbor_routes(services: Services) -> Sequence[Any]:  # type: ignore[empty-body]
    """Litestar route handlers to add to the API. Called once, when the server starts."""


@hookspec
def arbor_job_event(job: JobView, event: Event) -> None:
    """Called for every event of every job, on a thread with a bounded queue: an exception or a hang goes no further."""
