"""The fork server: a process that has imported a trainer's libraries and forks supervisors from them.

`python -m arbor_core.worker.forkserver <socket> <prove> <module> ...`. Importing TRL takes 10 s, forking takes 10 ms.
Before it is used it proves itself: a test fork calls the trainer's `prove` function; a library that does not survive a
fork is found out there and not in somebody's job. Says `ready` on standard output, and ends when its standard input
does.

Requests are one JSON line, `{"dir": <attempt dir>, "env": {...}, "log": <file>}`; the answer is the supervisor's pid.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import msgspec

from arbor_core.crash_points import crash_point
from arbor_core.jobdir.documents import import_object
from arbor_core.process.prctl import PR_SET_PDEATHSIG, die_with_parent, prctl
from arbor_core.process.wakeup import short_address
from arbor_core.storage.codec import decode

from .supervisor import keep

PROOF_FAILED = 4


class ForkRequest(msgspec.Struct, frozen=True):
    dir: Path
    env: dict[str, str]
    log: Path


def main(path: Path, prove: str, modules: list[str]) -> int:
    """Import, prove, serve."""
    die_with_parent(sys.stdin.fileno())  # serve() reads standard input, but not while libraries are imported
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print while they are imported is no answer
    for module in modules:
        import_module(module)
    gc.collect()
    gc.freeze()  # the collector would write to every shared page
    if prove and (status := _proof(prove)) != 0:
        print(f"the test fork of {prove} ended with status {status}", file=sys.stderr)
        return PROOF_FAILED
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with short_address(path) as address:
            listener.bind(address)
        listener.listen()
        os.write(answer, b"ready\n")
        os.close(answer)
        serve(listener)
    path.unlink(missing_ok=True)
    return 0


def serve(listener: socket.socket) -> None:
    """Fork a supervisor for every request until standard input ends."""
    while True:
        readable, _, _ = select.select([listener, sys.stdin.fileno()], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # supervisors that have ended
                pass
        if sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 1):
            return
        if listener in readable:
            connection, _ = listener.accept()
            with connection:
                try:
                    line = connection.makefile("rb").readline()
                    request = decode(line, ForkRequest)
                    connection.sendall(str(fork(request, listener, connection)).encode() + b"\n")
                except (OSError, msgspec.DecodeError):
                    traceback.print_exc()


def fork(request: ForkRequest, *inherited: socket.socket) -> int:
    """Start a supervisor; returns its pid."""
    crash_point("forkserver.requested")
    pid = os.fork()
    if pid:
        crash_point("forkserver.forked")
        return pid
    status = 1
    try:
        os.setsid()
        for one in inherited:
            one.close()
        _redirect(request.log)
        os.environ.update(request.env)
        os.chdir(request.dir)
        status = keep(request.dir)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _redirect(log: Path) -> None:
    """Standard input from nowhere, output into the attempt's log."""
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(output)


def _proof(prove: str) -> int:
    """Exit status of a fork that calls the function; negative for a signal."""
    server, pid = os.getpid(), os.fork()
    if pid == 0:
        _try(prove, server)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _try(prove: str, server: int) -> NoReturn:
    status = 1
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a fork server that is killed leaves no orphan
        if os.getppid() != server:  # it was killed before we said so
            os._exit(status)
        signal.alarm(120)  # a fork that hangs is a proof too
        import_object(prove)()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
