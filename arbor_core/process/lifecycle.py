"""A process from its start to its end: who it is, how it is ended, and what it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

STOP_SECONDS = 10.0


async def end(process: asyncio.subprocess.Process, grace: float | None = None) -> None:
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


def ref_of(pid: int) -> str:
    """`pid:start time:boot id`; empty if there is no such process, or only its remains."""
    try:
        state, *fields = stat_of(Path(f"/proc/{pid}/stat"))
        return "" if state in "ZX" else f"{pid}:{fields[18]}:{boot_id()}"
    except (FileNotFoundError, ProcessLookupError):  # for want of a descriptor, say, it is not known: that is an error
        return ""


def stat_of(path: Path) -> list[str]:
    """The fields of a `/proc/<pid>/stat`, the state first: its name, in parentheses before, may hold anything.

    Raises:
        OSError: there is no such process.
    """
    return path.read_bytes().rpartition(b")")[2].decode().split()


def boot_id() -> str:
    """What this start of the machine is called: a pid means nothing after it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


END_SECONDS = 10.0
"""How long a process may take to vanish after SIGKILL."""


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
