"""What ended a trainer, and what that means for its job."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from arbor_core.jobdir.failure_notes import DEVICE_LOST, OUT_OF_MEMORY, FailureNote, write_note
from arbor_core.process.resources import StorageLostError, is_disk_full, public_text
from arbor_core.types import ErrorEvent, PausedEvent

if TYPE_CHECKING:
    from .run import WorkerRun

LOST_WORDS = ("gpu is lost", "fallen off the bus", "uncorrectable ecc error", "uncorrectable nvlink error")
"""How NVML and CUDA's runtime say that a device is lost. What may also be a program's own mistake (`unknown error`,
`unspecified launch failure`) is not among them."""
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")
"""How CUDA, PyTorch's allocator on a CPU, the operating system, and cuBLAS say that memory has run out."""


def explain(run: WorkerRun[Any], error: Exception) -> int:
    """Say what an exception means: a full disk pauses the job, anything else ends the attempt. Returns the exit
    status."""
    if isinstance(error, StorageLostError) or not run.attempt_dir.exists():  # it is gone, or was moved away
        return 1  # nothing can be said of the job any more; the server finds the attempt ended
    root = run.dir.parent.parent  # the storage directory
    if run.rank == 0 and is_disk_full(error, run.dir):
        shutil.rmtree(run.work, ignore_errors=True)  # may make the room for saying so
        text = f"The disk is full ({public_text(error, root)}). The job is paused at its last checkpoint: "
        text += "make room and resume it"
        run.emit(PausedEvent(text, "error", code="insufficient_storage"))
        return 0
    message, code = f"{type(error).__name__}: {public_text(error, root)}"[:2000], "worker_error"
    if is_lost(error):
        code = DEVICE_LOST
        mine = run.devices if run.world_size == 1 else run.devices[run.rank : run.rank + 1]
        write_note(run.attempt_dir, FailureNote(code, message, [device.id for device in mine]))
    elif is_out_of_memory(error):
        code = OUT_OF_MEMORY
        if run.rank:
            write_note(run.attempt_dir, FailureNote(code, f"rank {run.rank}: {message}"))
    fail(run, message, code, None)
    return 1


def fail(run: WorkerRun[Any], message: str, code: str, param: str | None) -> None:
    """Report why the job cannot go on."""
    run.emit(ErrorEvent(message, "error", code=code, param=param))


def is_lost(error: BaseException) -> bool:
    """Whether a device that has gone is behind an error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError | OSError) and any(words in str(seen).lower() for words in LOST_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether too little memory, a device's or the machine's, is behind an error. PyTorch's allocator has a type for it
    on a GPU and only words on a CPU."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or "OutOfMemory" in type(seen).__name__:
            return True
        if isinstance(seen, RuntimeError | OSError) and any(words in str(seen).lower() for words in MEMORY_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
