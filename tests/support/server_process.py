"""Server processes, forked from one that has imported the server: that takes longer than what most of them do.

A fork is a server as any other: with arguments, an environment and output of its own. What it reads of its environment
while it is imported is looked at again; where that does not do (`COLD`), the server is started by its command.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

IMPORTED = (
    "arbor_core.cli.serve",
    "arbor_core.config.command_line",
    "arbor_core.config.compose",
    "arbor_core.application.system",
    "arbor_core.server.app",
    "arbor_core.server.http.serving",
    # what Litestar and uvicorn import when they begin
    "anyio._backends._asyncio",
    "litestar.exceptions.responses",
    "litestar.plugins.pydantic",
    "uvicorn.lifespan.on",
    "uvicorn.loops.asyncio",
)
COLD = ("PYTHON", "ARBOR_SEGMENT_BYTES")
"""Beginnings of variables that only a new interpreter heeds."""
MESSAGE_BYTES = 1 << 17
SERVE = "from arbor_core.cli.serve import serve; serve()"


class Forked:
    """A server that was forked, as far as `subprocess.Popen` is needed."""

    def __init__(self, pid: int, stdout: BinaryIO, status: BinaryIO) -> None:
        self.pid, self.stdout, self._status = pid, stdout, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode if self._ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(f"server {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its status is on the way
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float | None) -> bool:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode is not None


class Parent:
    """The process that servers are forked from; it ends with this one."""

    def __init__(self) -> None:
        self.variables = cold_variables(os.environ)
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        atexit.register(self.close)

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def fork(self, arguments: Sequence[str], env: Mapping[str, str], errors: BinaryIO, before: str) -> Forked:
        """See `start`."""
        request = {"arguments": arguments, "env": dict(env), "cwd": str(Path.cwd()), "code": f"{before}\n{SERVE}"}
        (said, stdout), (ended, status) = os.pipe(), os.pipe()
        try:
            descriptors = [stdout, errors.fileno(), status]
            socket.send_fds(self.socket, [json.dumps(request).encode()], descriptors)
        finally:
            os.close(stdout)
            os.close(status)
        return Forked(int(self.socket.recv(64)), os.fdopen(said, "rb"), os.fdopen(ended, "rb"))


_parent: Parent | None = None


def start(
    arguments: Sequence[str], env: Mapping[str, str], errors: BinaryIO, before: str = ""
) -> Forked | subprocess.Popen[bytes]:
    """A server process, whose standard output can be read.

    Args:
        errors: Its standard error.
        before: Python to run in it first.
    """
    global _parent  # noqa: PLW0603 - one for all tests
    if _parent is None or _parent.process.poll() is not None:
        _parent = Parent()
    if cold_variables(env) == _parent.variables:
        return _parent.fork(arguments, env, errors, before)
    program = ["-c", f"{before}\n{SERVE}"] if before else ["-m", "arbor_core", "serve"]
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env)


def cold_variables(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(COLD)}


def fork_servers(requests: socket.socket) -> Callable[[], None] | None:
    """Fork a server for every request, until the other end hangs up.

    Returns:
        In a fork, what it is to do.
    """
    statuses: dict[int, int] = {}
    woken, wakes = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        readable, _, _ = select.select([requests, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            tell_ended(statuses)
        if requests not in readable:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
        if not message:
            return None
        stdout, errors, status = descriptors
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(stdout, 1)
            os.dup2(errors, 2)
            requests.close()
            for descriptor in (*descriptors, *statuses.values(), woken, wakes):
                os.close(descriptor)
            return lambda: serve(**json.loads(message))
        statuses[pid] = status
        os.close(stdout)
        os.close(errors)
        requests.send(str(pid).encode())


def tell_ended(statuses: dict[int, int]) -> None:
    """Write the exit status of each server that has ended; negative for a signal."""
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError), os.fdopen(statuses.pop(pid), "w") as told:  # nobody may wait
                print(os.waitstatus_to_exitcode(status), file=told)


def load_plugins() -> None:
    """Import the plugins that are installed."""
    for plugin in importlib.metadata.entry_points(group="arbor"):
        with contextlib.suppress(Exception):  # the server says what is broken
            plugin.load()


def serve(arguments: list[str], env: dict[str, str], cwd: str, code: str) -> None:
    """Be a server."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, cwd)  # as `python -m` has it
    sys.argv = ["arbor-serve", *arguments]
    importlib.reload(sys.modules["arbor_core.crash_points"])  # reads where to die
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(code, scope)


if __name__ == "__main__":
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    load_plugins()
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requested:
        begin = fork_servers(requested)
    if begin:
        begin()
