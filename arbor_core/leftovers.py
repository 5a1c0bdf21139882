"""What processes that were killed leave in a job's directory: half-written files, checkpoints nobody has told of,
and children that outlived their keeper."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from . import checkpoints
from .faults import crash_point
from .keeper import boot_id, ref_of, stat_of
from .logs import tail
from .types import Event

log = logging.getLogger(__name__)
LIVE = ("weights", "ledger", "asked")
"""Folders of a job's directory that nobody needs after its end."""
REF = "process"
"""File in an engine's directory that says which process it is."""
END_SECONDS = 10.0
"""How long a process may take to vanish after SIGKILL."""


def sweep(job_dir: Path) -> None:
    """Remove what was not finished: no process of the job may live."""
    for pattern in ("checkpoints/*.tmp", "weights/*.tmp", "attempts/*/work"):
        for folder in job_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    for pattern in (".*.tmp", "attempts/*/.*.tmp", "attempts/*/.keeper.*", f"checkpoints/{checkpoints.NAMED}/.*.tmp"):
        for path in job_dir.glob(pattern):
            path.unlink(missing_ok=True)


def forget_rollouts(job_dir: Path) -> None:
    """Remove what only served while the job learned: policies, completions, and requests that nobody can answer any
    more. Its inbox stays: `arbor replay` repeats the training from it."""
    for name in LIVE:
        shutil.rmtree(job_dir / name, ignore_errors=True)
        crash_point(f"forgotten.{name}")


def reconciled(job_dir: Path, attempt: int) -> list[Event]:
    """The events that an attempt could not write any more: its checkpoints that were not reported, and withdrawals of
    any that are not whole, as far as can be seen without reading them. What it had reported as discarded is removed."""
    folder = job_dir / "checkpoints"
    known: set[str] = set()
    for _, event in tail(job_dir / "attempts" / str(attempt) / "events.jsonl", 0, Event):
        if event.type in ("checkpoint", "discarded"):
            known.add(event.data["dir"])
        if event.type == "discarded":
            shutil.rmtree(folder / event.data["dir"], ignore_errors=True)
    found = []
    for path in reversed(checkpoints.newest_first(folder)):
        said = checkpoints.manifest(path)
        if reason := checkpoints.fault(path, sizes_only=True):
            found.append(checkpoints.withdrawal(path, reason))
        elif said and said.attempt == attempt and path.name not in known:
            found.append(created(path, said))
    return found


def created(folder: Path, said: checkpoints.Manifest) -> Event:
    """The event of a checkpoint that nobody has told of."""
    return Event(
        "checkpoint",
        f"Checkpoint created at step {said.step}",
        step=said.step,
        data={"dir": folder.name, "metrics": said.metrics},
        at=(folder / checkpoints.MANIFEST).stat().st_mtime,
    )


def end_engines(root: Path) -> None:
    """Kill engines of an earlier server that did not hear of its end: one that was stopped while it started, say."""
    for path in root.glob(f"*/{REF}"):
        ref = path.read_text(errors="replace")
        pid = ref.partition(":")[0]
        if pid.isdecimal() and ref == ref_of(int(pid)):
            try:
                end_strays(ref)
            except TimeoutError as error:
                log.warning("an engine of an earlier server is left: %s", error)


def end_strays(leader: str) -> None:
    """Kill what is left of a session whose leader was killed, and wait until it is gone: nobody else can do it.

    Args:
        leader: The leader's ref. While one process of its session lives, its pid is given to nobody else; where it was
            given away, or the machine has been started anew, nothing is left.

    Raises:
        TimeoutError: it does not end. It may hold a device, so nobody else may have that yet.
    """
    pid, _, rest = leader.partition(":")
    if not rest.endswith(f":{boot_id()}") or ref_of(int(pid)) not in ("", leader):
        return
    deadline = time.monotonic() + END_SECONDS
    while found := list(session(pid)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the processes {found} were killed and do not end")
        for one in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.01)


def session(leader: str) -> Iterator[int]:
    """The live processes of a session; none where there is no /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number, *_ = stat_of(stat)
        except OSError:  # it has ended
            continue
        if number == leader and state not in "ZX":
            yield int(stat.parent.name)
