"""Python processes that are forked from one that has imported their libraries: importing takes longer than what most
tests have them do. Each is as `python -c CODE ARGUMENT ...` would be, with an environment and output of its own.

`python forks.py <descriptor> <module> ...` is the process that forks. What a module read of the environment when it was
imported is that of this process; fault points are set anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MESSAGE_BYTES = 1 << 17
FAULT_POINTS = "arbor_core.crash_points"


class Forked:
    """A process that was forked, as far as `subprocess.Popen` is needed."""

    def __init__(self, pid: int, stdout: BinaryIO | None, status: BinaryIO) -> None:
        self.pid, self.stdout, self._status = pid, stdout, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status if it has ended, negative for a signal."""
        return self.returncode if self._ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended within `timeout` seconds.
        """
        if not self._ended(timeout) or self.returncode is None:
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its status is on the way
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float | None) -> bool:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            told = self._status.readline()
            if not told:
                raise RuntimeError(f"nobody knows how {self.pid} ended: the process that it was forked from is gone")
            self.returncode = int(told)
            self._status.close()
        return self.returncode is not None


Process = Forked | subprocess.Popen[bytes]


class Forks:
    """A process that has imported modules, and forks. It ends with this one; what was forked goes on.

    Args:
        modules: One that cannot be imported is left to who needs it.
        env: Its environment.
    """

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self.lock = threading.Lock()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(number), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[number],
                env=env,
            )
        atexit.register(self.close)

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def start(
        self,
        code: str,
        arguments: Sequence[str] = (),
        *,
        env: Mapping[str, str],
        stderr: BinaryIO,
        stdout: BinaryIO | None = None,
    ) -> Forked:
        """`python -c code argument ...` in this directory.

        Args:
            stdout: None: a pipe, whose other end the process returned has.
        """
        request = json.dumps({"code": code, "arguments": arguments, "env": dict(env), "cwd": str(Path.cwd())})
        ended, status = os.pipe()
        said, written = (None, stdout.fileno()) if stdout else os.pipe()
        try:
            with self.lock:
                socket.send_fds(self.socket, [request.encode()], [written, stderr.fileno(), status])
                pid = int(self.socket.recv(64))
        finally:
            os.close(status)
            if said is not None:
                os.close(written)
        return Forked(pid, None if said is None else os.fdopen(said, "rb"), os.fdopen(ended, "rb"))


_found: dict[Any, Forks] = {}


def forks(modules: Sequence[str], env: Mapping[str, str], read: tuple[str, ...] = ()) -> Forks:
    """The process that has imported some modules; one for all tests of this process.

    Args:
        read: How the names begin of variables that matter while they are imported, beside those of Python.
    """
    chosen = {name: value for name, value in env.items() if name.startswith(("PYTHON", *read))}
    key = (tuple(modules), tuple(sorted(chosen.items())))
    if key not in _found or _found[key].process.poll() is not None:
        _found[key] = Forks(modules, env)
    return _found[key]


def serve(requests: socket.socket) -> Callable[[], None] | None:
    """Fork for every request, until the other end hangs up.

    Returns:
        In a fork, what it is to do.
    """
    statuses: dict[int, int] = {}
    woken, wakes = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        readable, _, _ = select.select([requests.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            tell_ended(statuses)
        if requests.fileno() not in readable:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
        if not message:
            return None
        stdout, stderr, status = descriptors
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            requests.close()
            for descriptor in (*descriptors, *statuses.values(), woken, wakes):
                os.close(descriptor)
            return lambda: run(**json.loads(message))
        statuses[pid] = status
        os.close(stdout)
        os.close(stderr)
        requests.send(str(pid).encode())


def tell_ended(statuses: dict[int, int]) -> None:
    """Write the exit status of each fork that has ended."""
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError), os.fdopen(statuses.pop(pid), "w") as told:  # nobody may wait
                print(os.waitstatus_to_exitcode(status), file=told)


def run(code: str, arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """Be `python -c`."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = ["-c", *arguments]
    if FAULT_POINTS in sys.modules:
        importlib.reload(sys.modules[FAULT_POINTS])  # it reads where to die
    exec(code, {"__name__": "__main__"})  # noqa: S102 - the test's own


if __name__ == "__main__":
    for module in sys.argv[2:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requested:
        begin = serve(requested)
    if begin:
        begin()
