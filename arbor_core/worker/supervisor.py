"""The supervisor: the small parent of an attempt's processes. It outlives the server and writes how the attempt ended.

`python -m arbor_core.worker.supervisor <attempt dir>`, or a fork of the fork server. It runs in a session of its own,
adopts whatever its worker leaves behind, ends all of it, and only then writes `exit.json`: who reads that file knows
that no process of the attempt lives.

Nothing lives on without its storage: an attempt whose directory has been gone, or could not be written, for
`limits.room_seconds` is ended, and its supervisor with it; the server finds out by itself. A full disk is no such case.
One whose directory was moved is ended at once, and told so there: the next attempt goes on at the new place.

An attempt has one supervisor. It says who it is in a file that can be made only once; a server that has lost sight of
an attempt makes that file itself, so that no supervisor that is late can begin it any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.jobdir.documents import read_order
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.process.exit import ignore_output_errors, run_and_exit
from arbor_core.process.places import hold, moved_to, place_ref
from arbor_core.process.prctl import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from arbor_core.process.resources import DISK_FULL_ERRNOS
from arbor_core.process.wakeup import wake
from arbor_core.storage.atomic import replace
from arbor_core.types import AttemptOrder, Exit

WAKE_SECONDS = 1.0
NOT_OURS = 5
"""Exit status of a supervisor that came too late."""
WAITED_FOR = {signal.SIGTERM, signal.SIGCHLD}


def keep(attempt_dir: Path) -> int:
    """Run the attempt's worker to its end and write `exit.json`; returns the worker's exit status."""
    ignore_output_errors()
    attempt = AttemptDir(attempt_dir.absolute())
    order = read_order(attempt)
    if attempt.claim(own := place_ref(os.getpid(), attempt.path)) != own:
        print(f"supervisor {own}: this attempt has another supervisor, or was given up before that", file=sys.stderr)
        return NOT_OURS
    crash_point("supervisor.claimed")
    held = hold(attempt.path)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
    me, worker = os.getpid(), os.fork()
    if worker == 0:
        os.close(held)
        run_and_exit(lambda: _work(order, me))
    crash_point("supervisor.forked")
    with contextlib.suppress(OSError):  # the child does the same: whoever comes first
        os.setpgid(worker, worker)
    storage = StorageWatch(attempt, order.room_seconds, held)
    code = _wait(worker, order.grace, storage)
    _end_all(worker)
    ended = Exit(code, time.time())
    crash_point("supervisor.ended")
    storage.write_exit(msgspec.json.encode(ended))
    crash_point("supervisor.told")
    wake(order.bell, attempt.job.path.name)
    return code


def _work(order: AttemptOrder, supervisor: int) -> int:
    """The child's side of the fork; the exit status."""
    os.setpgid(0, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a supervisor that is killed leaves no orphan
    if os.getppid() != supervisor:  # it was killed before we said so
        return -signal.SIGKILL
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITED_FOR)
    if order.argv:
        os.execvp(order.argv[0], order.argv)  # noqa: S606 - the operator's launcher
    from .main import main

    return main(order.dir)


class StorageWatch:
    """How long an attempt has been without its storage. What lasts less than `seconds` may pass.

    Args:
        held: The descriptor by which the attempt's directory is held.
    """

    def __init__(self, attempt: AttemptDir, seconds: float, held: int) -> None:
        self.attempt, self.seconds, self.held = attempt, seconds, held
        self.since: float | None = None
        """When it was found out of reach (`time.monotonic`); None: it is there."""
        self.told = False

    def lost(self) -> bool:
        """Whether the attempt must end, because its directory is not there, or cannot be written, or was moved."""
        try:
            if not os.path.samestat(self.attempt.path.stat(), os.fstat(self.held)):  # another was put in its place
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.attempt.path))
            fault = None if os.access(self.attempt.path, os.W_OK) else OSError(errno.EROFS, os.strerror(errno.EROFS))
        except FileNotFoundError as error:
            if moved_to(self.held):
                print("supervisor: the storage directory was moved: the attempt ends", file=sys.stderr)
                return True
            fault = error
        except OSError as error:
            fault = error
        return self._lasts(fault)

    def write_exit(self, content: bytes) -> None:
        """Write how the attempt ended, as soon as there is room; give up where there is no storage."""
        while True:
            try:
                place = self._place()
                return None if place is None else replace(AttemptDir(place).exit, content)
            except FileNotFoundError:  # moved or removed meanwhile
                pass
            except OSError as error:
                if self._lasts(None if error.errno in DISK_FULL_ERRNOS else error):
                    return None
            time.sleep(WAKE_SECONDS)

    def _place(self) -> Path | None:
        """Where the attempt's directory is now, and not what was put in its place (a copy, say); None: it was removed,
        and there is nobody to tell."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.attempt.path.stat(), os.fstat(self.held)):
                return self.attempt.path
        return moved_to(self.held)

    def _lasts(self, fault: OSError | None) -> bool:
        """Note whether there is a fault now; True: there has been for too long."""
        now = time.monotonic()
        self.since = None if fault is None else self.since or now
        if fault is None or self.since is None or now - self.since <= self.seconds:
            return False
        if not self.told:
            print(f"supervisor: no storage for {self.seconds:g} s ({fault}): the attempt ends", file=sys.stderr)
        self.told = True
        return True


def _wait(worker: int, grace: float, storage: StorageWatch) -> int:
    """Wait for the worker; SIGTERM is passed on, SIGKILL follows after `grace` seconds."""
    deadline: float | None = None
    while True:
        got = signal.sigtimedwait(WAITED_FOR, WAKE_SECONDS)
        if (got and got.si_signo == signal.SIGTERM) or (deadline is None and storage.lost()):
            _kill(worker, signal.SIGTERM)
            _kill(worker, signal.SIGCONT)  # one that was stopped can hear it
            deadline = deadline or time.monotonic() + grace
        if deadline and time.monotonic() > deadline:
            _kill(worker, signal.SIGKILL)
        for pid, status in _reaped():
            if pid == worker:
                return os.waitstatus_to_exitcode(status)


def _reaped() -> Iterator[tuple[int, int]]:
    """Children that have ended, with their wait status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _kill(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _end_all(worker: int) -> None:
    """Kill what the worker left: its group, and descendants that changed their group and are now our children."""
    _kill(worker, signal.SIGKILL)
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)
        list(_reaped())


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:  # not Linux: the group was all we could know
        return []


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1])))
