"""The start of an engine, from its devices to a process that answers; and those that failed just before."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec.structs import replace

from arbor_core.jobs.leases import LeaseHistory
from arbor_core.models.fine_tuned import FullPolicy
from arbor_core.types import (
    RETRY_SOON,
    Allocator,
    ApiError,
    ArborError,
    Bundle,
    Claim,
    Engine,
    EngineSpec,
    Lease,
)

from .leasing import lease, lease_at_once
from .process import EngineInterruptedError
from .redaction import refusal
from .served_model import Key, ServedModel

log = logging.getLogger(__name__)

FAILURE_SECONDS = 30.0
"""Seconds for which a model that could not be served is not tried again: a client that insists would start a process
with each request."""


class EngineStarter:
    """Starts engines on devices that it leases.

    Args:
        allocator: Who grants devices of the pool `engine`.
        root: Directory of the engines' scratch directories.
        threads: CPU threads of an engine.
        history: Is told of the engines' leases.
        end_idle: Ends the engine that nobody has used for longest, if one is idle.
        newest: Finds the newest weights of a job's own engine.
    """

    def __init__(
        self,
        allocator: Allocator,
        root: Path,
        threads: int,
        history: LeaseHistory | None,
        end_idle: Callable[[], Awaitable[None]],
        newest: Callable[[ServedModel], FullPolicy | None],
    ) -> None:
        self.allocator, self.root, self.threads, self.history = allocator, root, threads, history
        self.end_idle, self.newest = end_idle, newest
        self.count = 0
        """Processes that were started."""
        self.released = asyncio.Event()
        """Is set when an engine has ended, or is not used any more."""

    async def start(self, model: ServedModel) -> Engine:
        """Lease devices and start an engine on them. Whoever calls gives them back, with `release`.

        Raises:
            UnknownModelError: there are no such weights.
            ArborError, OSError: there are no devices, or the process did not start.
        """
        if model.full is None or not model.full.stored:
            await model.backend.backend.find(model.full.path if model.full else model.key.path)
        model.lease = await self._lease(model)
        if self.history:
            self.history.begin(model.lease)
        return await self._begin(model, model.lease)

    async def _lease(self, model: ServedModel) -> Lease:
        """Devices for an engine. One that is not the first of its model makes nobody end, and does not wait."""
        needs = model.needs
        claim = Claim(f"engine:{model.key.name}", (Bundle("engine", needs.devices, needs.share),))
        if not model.extra:
            return await lease(self.allocator, claim, self.end_idle, self.released)
        if found := await lease_at_once(self.allocator, claim):
            return found
        raise ArborError("no devices are free for another engine of it")

    async def _begin(self, model: ServedModel, lease: Lease) -> Engine:
        """Start the process of an engine."""
        self.count += 1
        model.dir = self.root / str(self.count)
        backend = model.backend.backend
        spec = EngineSpec(
            model=model.key.name,
            path=model.key.path,
            dir=model.dir,
            devices=lease.of("engine"),
            threads=self.threads,
            token=secrets.token_urlsafe(24),
            options=dict(model.backend.options),
            share=model.needs.share,
        )
        if model.full is None:
            return await backend.start(spec)
        with model.reading_newest(lambda: self.newest(model)) as weights:
            return await backend.start(replace(spec, path=weights.path, version=weights.version, sent=weights.sent))

    def release(self, model: ServedModel) -> None:
        """Give an engine's devices back, if it has any."""
        if model.lease:
            if self.history:  # before anybody else gets the device
                self.history.end(model.lease, model.ending)
            self.allocator.release(model.lease)
            model.lease = None
        self.released.set()


class FailedStarts:
    """The models whose engines failed to start a moment ago.

    Args:
        root: Directory of the engines' scratch directories.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.failed: dict[Key, tuple[float, Exception]] = {}
        """Until when a start is not tried again, and why."""
        self.interrupted: set[Key] = set()
        """Those whose process somebody killed or stopped in the last start."""
        self.alone: dict[tuple[str, str], float] = {}
        """Until when no other engine is started beside those of a model, by its name and path."""

    def check(self, key: Key) -> None:
        """Refuse a start that failed just before.

        Raises:
            ApiError: as when it failed.
        """
        self.failed = {failed: entry for failed, entry in self.failed.items() if time.monotonic() < entry[0]}
        if key in self.failed:
            raise self.refusal(key, self.failed[key][1])

    def stays_alone(self, name: str, path: str) -> bool:
        """Whether no other engine of a model could be started just before."""
        return time.monotonic() < self.alone.get((name, path), 0)

    def add(self, model: ServedModel, error: Exception) -> ApiError:
        """Note that an engine did not start; the answer to those who wait for it."""
        key, until = model.key, time.monotonic() + FAILURE_SECONDS
        by_others = isinstance(error, EngineInterruptedError) and key not in self.interrupted
        if model.extra:
            self.alone[key[:2]] = until
        elif by_others:  # once: where there is too little memory for a model, the kernel does so each time
            self.interrupted.add(key)
        elif not model.superseded():
            self.failed[key] = (until, error)
            return self.refusal(key, error)
        message = f"'{key.name}' is loaded anew."  # the next request fares better
        return ApiError(503, message, "engine_unavailable", "model", RETRY_SOON)

    def started(self, key: Key) -> None:
        """Note that an engine has started."""
        self.interrupted.discard(key)

    def refusal(self, key: Key, error: Exception) -> ApiError:
        """The answer to requests for a model that cannot be served."""
        return refusal(key.name, key.path, self.root, error)

    def forget(self, name: str, path: str) -> None:
        """Let engines of a model be started although they failed just before."""
        self.failed = {key: entry for key, entry in self.failed.items() if key[:2] != (name, path)}
        self.alone.pop((name, path), None)
