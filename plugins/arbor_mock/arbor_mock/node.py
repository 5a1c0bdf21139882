"""A machine that a server reaches over a socket and in no other way: `python -m arbor_mock.node DIR`.

It starts the workers of attempts and is their supervisor: it alone knows which of them live, who has begun which, and
how they ended. It outlives the server and ends when it has had neither an attempt nor a call for a while. Killed, it
takes its attempts along, as a machine does that loses its power. The disk with the jobs' directories is the server's,
as in many clusters; what the node knows of attempts is on a disk of its own, the folder DIR.

A call is a line of JSON on the socket `socket` in that folder, `{"do": "poll", ...}` with the arguments of a method of
`Node`, and so is the answer: `{"answer": ...}`, or `{"error": "..."}`.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import itertools
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import AttemptDir, Exit, crash_point, last_beat, replace, wake

IDLE_SECONDS = 1.0
BOOT_SECONDS = 20.0
RETRY_SECONDS = 0.5
LOOK_SECONDS = 0.05
LINE_BYTES = 1 << 24
"""The longest call."""
SOCKET = "socket"
"""In the node's folder."""
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


@dataclass
class Worker:
    """A worker that lives."""

    process: asyncio.subprocess.Process
    attempt: AttemptDir
    grace: float
    """Seconds between SIGTERM and SIGKILL."""
    room: float
    """For how many seconds to try to write how it ended."""
    bell: str | None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing of it lives and that is written down."""

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Node:
    """What the machine does when it is called. A ref is `node:<start of the machine>:<number>`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self.lock = folder, lock
        self.name, self.numbers = secrets.token_hex(4), itertools.count(1)
        self.workers: dict[str, Worker] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.called, self.calls = time.monotonic(), 0
        """When it was called last, and the calls that are being answered."""
        self.claiming = asyncio.Lock()
        """Held from the claim until the worker can be seen."""

    def claims(self, attempt: str) -> AttemptDir:
        """Where the node keeps who has begun an attempt."""
        path = Path(attempt)
        return AttemptDir(self.folder / "claims" / path.parent.parent.name / path.name)

    async def start(
        self, attempt: str, argv: Sequence[str], env: Mapping[str, str], grace: float, room: float, bell: str | None
    ) -> str:
        """Start an attempt, unless somebody has begun it or it was given up."""
        ref = f"node:{self.name}:{next(self.numbers)}"
        async with self.claiming:
            if self.claims(attempt).claim(ref) == ref:
                crash_point("node.claimed")
                process = await self._worker(attempt, argv, env)
                worker = self.workers[ref] = Worker(process, AttemptDir(Path(attempt)), grace, room, bell)
                task = asyncio.create_task(self._supervise(ref, worker))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
                crash_point("node.started")
        return ref

    async def _worker(self, attempt: str, argv: Sequence[str], env: Mapping[str, str]) -> asyncio.subprocess.Process:
        with AttemptDir(Path(attempt)).log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(env),
                cwd=attempt,
                start_new_session=True,
                pass_fds=(self.lock,),  # held until the last worker has ended: see `boot`
                preexec_fn=die_with(os.getpid()),
            )

    async def _supervise(self, ref: str, worker: Worker) -> None:
        """Wait for the end of a worker, end what it left, and write how it ended: then it does not live any more."""
        code = await worker.process.wait()
        worker.signal(signal.SIGKILL)
        crash_point("node.ended")
        content, until = msgspec.json.encode(Exit(code, time.time())), time.monotonic() + worker.room
        while time.monotonic() < until:
            try:
                replace(worker.attempt.exit, content)
                break
            except FileNotFoundError:  # the job's directory was removed: there is nobody to tell
                break
            except OSError:  # a full disk, say: nobody but us knows how the attempt ended
                traceback.print_exc()
                await asyncio.sleep(RETRY_SECONDS)
        del self.workers[ref]
        worker.ended.set()
        wake(worker.bell, worker.attempt.job.path.name)

    async def poll(self, refs: Sequence[str]) -> dict[str, str | None]:
        """The heartbeats of those that live."""
        return {ref: last_beat(self.workers[ref].attempt.heartbeat) for ref in refs if ref in self.workers}

    async def adopt(self, attempt: str) -> str:
        """Who has begun an attempt; empty: nobody, and nobody will."""
        async with self.claiming:  # who has claimed it lives, or has ended
            return self.claims(attempt).revoke_claim()

    async def signal(self, ref: str, number: int) -> None:
        """Signal a worker. SIGTERM ends it, at once or after its grace."""
        if worker := self.workers.get(ref):
            worker.signal(number)
            if number == signal.SIGTERM:
                worker.signal(signal.SIGCONT)  # one that was stopped can hear it
                asyncio.get_running_loop().call_later(worker.grace, self._kill, ref)

    def _kill(self, ref: str) -> None:
        if worker := self.workers.get(ref):
            worker.signal(signal.SIGKILL)

    async def end(self, ref: str) -> None:
        """Kill a worker. Of an earlier start of this machine nothing lives: see `boot`."""
        if worker := self.workers.get(ref):
            worker.signal(signal.SIGKILL)
            await worker.ended.wait()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call. Until then the machine is not idle, however long a process takes to start."""
        self.calls += 1
        try:
            await self._answer(reader, writer)
        finally:
            self.called, self.calls = time.monotonic(), self.calls - 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            if not (line := await reader.readline()).endswith(b"\n"):  # the server died while it called
                return
            try:
                writer.write(msgspec.json.encode({"answer": await self.do(**msgspec.json.decode(line))}))
            except Exception as error:
                traceback.print_exc()
                writer.write(msgspec.json.encode({"error": f"{type(error).__name__}: {error}"}))
            writer.write(b"\n")
            await writer.drain()

    async def do(self, do: str, **arguments: Any) -> Any:
        calls = {"start": self.start, "poll": self.poll, "adopt": self.adopt, "signal": self.signal, "end": self.end}
        return await calls[do](**arguments)  # type: ignore[operator]

    def idle(self) -> bool:
        return not self.tasks and not self.calls and time.monotonic() - self.called > IDLE_SECONDS


def die_with(node: int) -> Any:
    """What a worker does before it becomes one: it is killed when the node dies, also if that was a moment ago."""

    def prepare() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != node:
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def boot(folder: Path) -> int | None:
    """Become the machine. Its lock is inherited by its workers: an earlier start of the machine has it as long as
    anything of it lives.

    Returns:
        The lock's descriptor; None: another one is up, or something of an earlier one does not end.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(SOCKET)
            return None
        time.sleep(LOOK_SECONDS)
    return None


async def serve(folder: Path, lock: int) -> None:
    """Answer calls until there is nothing to do."""
    node = Node(folder, lock)
    async with await asyncio.start_unix_server(node.answer, SOCKET, backlog=1024, limit=LINE_BYTES):
        while not node.idle():  # noqa: ASYNC110 - it is about the time that passes
            await asyncio.sleep(LOOK_SECONDS)


def main() -> int:
    folder = Path(sys.argv[1]).absolute()
    os.chdir(folder)  # however deep it is, the address of its socket is short
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (lock := boot(folder)) is None:
        return 1
    Path(SOCKET).unlink(missing_ok=True)  # of an earlier start of the machine
    asyncio.run(serve(folder, lock))
    Path(SOCKET).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
