"""What plugins' routes may use of the server (`arbor_core.types.Services`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from arbor_core.config import typed
from arbor_core.submission import CreateFineTuningJobRequest
from arbor_core.system import Arbor
from arbor_core.types import TERMINAL

from . import wire
from .fine_tuning import found, shown, submit

POLL_SECONDS = 0.2


class ServerServices:
    """Jobs, for plugins: with the same checks and the same objects as over HTTP."""

    def __init__(self, arbor: Arbor) -> None:
        self.arbor = arbor

    async def create_job(self, request: Mapping[str, Any], owner: str) -> dict[str, Any]:
        body = typed(dict(request), CreateFineTuningJobRequest, "")
        return plain(await submit(self.arbor, body, owner))

    async def job(self, job_id: str, owner: str) -> dict[str, Any]:
        return plain(shown(self.arbor, found(self.arbor, job_id, owner)))

    async def events(self, job_id: str, owner: str) -> AsyncIterator[dict[str, Any]]:
        job, seen = found(self.arbor, job_id, owner), 0
        while True:
            ended = job.status in TERMINAL  # before the events: after a job's end there are no more
            for row in self.arbor.jobs.events_after(job.id, seen):
                yield plain(wire.event_object(row))
                seen = row.seq
            if ended:
                return
            await asyncio.sleep(POLL_SECONDS)
            job = found(self.arbor, job_id, owner)


def plain(value: msgspec.Struct) -> dict[str, Any]:
    return dict(msgspec.to_builtins(value))
