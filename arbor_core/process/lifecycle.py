"""How processes are named, ended, and found again after their leader's death.

A process ref names one process for good: a pid alone may be given to another process, and means nothing after a reboot.
It may go on with the directory to which the process belongs (`places.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Collection
from functools import cache
from pathlib import Path

STOP_SECONDS = 10.0
"""How long a process may take to end after SIGTERM."""
KILL_SECONDS = 10.0
"""How long a process may take to vanish after SIGKILL."""
DEAD = "ZX"
"""States of `/proc/<pid>/stat`: a zombie, and a process about to be removed."""


async def terminate(process: asyncio.subprocess.Process, grace: float | None = None) -> None:
    """SIGTERM to the process group, SIGKILL after `grace` seconds (`STOP_SECONDS`); returns when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS if grace is None else grace)
    except TimeoutError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def process_ref(pid: int) -> str:
    """`pid:start time:boot id`; empty if there is no such process, or it is a zombie.

    Raises:
        OSError: it could not be looked up (no descriptors are left, for example).
    """
    try:
        state, *fields = stat_fields(Path(f"/proc/{pid}/stat"))
        return "" if state in DEAD else f"{pid}:{fields[18]}:{boot_id()}"
    except (FileNotFoundError, ProcessLookupError):
        return ""


def process_of(ref: str) -> str:
    """The part of a ref that names the process."""
    return ":".join(ref.split(":")[:3])


def lives(ref: str) -> bool:
    """Whether the process with this ref lives. Texts that are no refs name no process.

    Raises:
        OSError: it could not be looked up.
    """
    pid = ref.partition(":")[0]
    return pid.isdecimal() and process_ref(int(pid)) == process_of(ref)


def send_signal(ref: str, number: int) -> None:
    """Send a signal to a process; nothing happens if it has ended."""
    if lives(ref):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(ref.partition(":")[0]), number)


def stat_fields(path: Path) -> list[str]:
    """The fields of a `/proc/<pid>/stat`, from the state on: the name before it, in parentheses, may hold anything.

    Raises:
        OSError: there is no such process.
    """
    return path.read_bytes().rpartition(b")")[2].decode().split()


@cache
def boot_id() -> str:
    """The id of the machine's current boot: the same as long as this process lives."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def kill_session(leader: str) -> None:
    """Kill the processes of a session and all that descend from them, and wait until they are gone. Of one whose leader
    was killed before those are left that did not leave it.

    Args:
        leader: The leader's ref. Its pid is not given to another process while one of its session lives: if it was, or
            the machine was booted again, nothing is left.

    Raises:
        TimeoutError: they do not end. They may hold a device, so nobody else may have that yet.
    """
    leader = process_of(leader)
    pid, _, rest = leader.partition(":")
    if not rest.endswith(f":{boot_id()}") or process_ref(int(pid)) not in ("", leader):
        return
    deadline = time.monotonic() + KILL_SECONDS
    left: set[tuple[int, str]] = set()
    while left := family(pid, left):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the processes {sorted(member for member, _ in left)} were killed and do not end")
        for member, _ in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.01)


def family(session: str, known: Collection[tuple[int, str]] = ()) -> set[tuple[int, str]]:
    """The live processes of a session, those of `known`, and all that descend from them; none where there is no /proc.

    Args:
        known: Processes that were found before, and whose parents may have ended since.

    Returns:
        Pids with start times: a pid may be given to another process.
    """
    parents: dict[int, tuple[int, str]] = {}
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat_fields(stat)
        except OSError:  # it has ended
            continue
        pid, state, parent, of, start = int(stat.parent.name), fields[0], int(fields[1]), fields[3], fields[19]
        if state in DEAD:
            continue
        parents[pid] = (parent, start)
        if of == session or (pid, start) in known:
            found.add(pid)
    while more := {pid for pid, (parent, _) in parents.items() if parent in found} - found:
        found |= more
    return {(pid, parents[pid][1]) for pid in found}
