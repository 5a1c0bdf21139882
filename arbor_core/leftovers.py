"""What processes that were killed leave in a job's directory: half-written files, checkpoints nobody has told of,
and children that outlived their keeper."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from . import checkpoints
from .logs import tail
from .types import Event

END_SECONDS = 10.0
"""How long a process may take to vanish after SIGKILL."""


def sweep(job_dir: Path) -> None:
    """Remove what was not finished: no process of the job may live."""
    for folder in (*job_dir.glob("checkpoints/*.tmp"), *job_dir.glob("attempts/*/work")):
        shutil.rmtree(folder, ignore_errors=True)
    for pattern in (".*.tmp", "attempts/*/.*.tmp", "attempts/*/.keeper.*"):
        for path in job_dir.glob(pattern):
            path.unlink(missing_ok=True)


def reconciled(job_dir: Path, attempt: int) -> list[Event]:
    """The events that an attempt could not write any more: its checkpoints that are whole and were not reported.
    Checkpoints that it had reported as discarded are removed."""
    known: set[str] = set()
    for _, event in tail(job_dir / "attempts" / str(attempt) / "events.jsonl", 0, Event):
        if event.type in ("checkpoint", "discarded"):
            known.add(event.data["dir"])
        if event.type == "discarded":
            shutil.rmtree(job_dir / "checkpoints" / event.data["dir"], ignore_errors=True)
    return [
        Event(
            "checkpoint",
            f"Checkpoint created at step {said.step}",
            step=said.step,
            data={"dir": folder.name, "metrics": said.metrics},
            at=(folder / checkpoints.MANIFEST).stat().st_mtime,
        )
        for folder in reversed(checkpoints.newest_first(job_dir / "checkpoints"))
        if folder.name not in known and (said := checkpoints.manifest(folder)) and said.attempt == attempt
    ]


def end_strays(folder: Path) -> None:
    """Kill the processes that work in a folder and wait until they are gone: a keeper that is killed cannot do it."""
    deadline = time.monotonic() + END_SECONDS
    while (found := list(processes_in(folder))) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.01)


def processes_in(folder: Path) -> Iterator[int]:
    """Processes whose working directory is `folder` or below; none where there is no /proc."""
    inside = str(folder.resolve())
    for entry in os.scandir("/proc") if Path("/proc").is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            at = os.readlink(f"{entry.path}/cwd")  # noqa: PTH115 - a folder may be deleted: it is text
        except OSError:  # it has ended, or is somebody else's
            continue
        if at == inside or at.startswith(f"{inside}/"):
            yield int(entry.name)
