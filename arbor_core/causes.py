"""What ended a trainer, and what that means for its job."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from . import lost, memory
from .room import is_full
from .types import Event

if TYPE_CHECKING:
    from .worker import WorkerRun


def explain(run: WorkerRun[Any], error: Exception) -> int:
    """Say what an exception means: a full disk pauses the job, anything else ends the attempt. Returns the exit
    status."""
    if run.rank == 0 and is_full(error, run.dir):
        shutil.rmtree(run.work, ignore_errors=True)  # may make the room for saying so
        text = f"The disk is full ({error}). The job is paused at its last checkpoint: make room and resume it"
        run.emit(Event("paused", text, "error", data={"code": "insufficient_storage", "message": text}))
        return 0
    message, code = f"{type(error).__name__}: {error}"[:2000], "worker_error"
    if lost.is_lost(error):
        code = lost.CODE
        mine = run.devices if run.world_size == 1 else run.devices[run.rank : run.rank + 1]
        lost.leave_word(run.attempt_dir, mine, message)
    elif memory.is_out_of_memory(error):
        code = memory.CODE
        if run.rank:
            memory.leave_word(run.attempt_dir, f"rank {run.rank}: {message}")
    fail(run, message, code, None)
    return 1


def fail(run: WorkerRun[Any], message: str, code: str, param: str | None) -> None:
    """Report why the job cannot go on."""
    run.emit(Event("error", message, "error", data={"code": code, "message": message, "param": param}))
