"""The executor `local`: attempts as processes of this machine, each under a supervisor that outlives the server.

A ref names the supervisor and the attempt's directory (`process/places.py`), so that neither a pid that was given to
another process nor the supervisor of the directory of which this one is a copy is mistaken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arbor_core.jobdir.heartbeat import last_beat
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.process.environment import clean_env, threads_env, worker_env
from arbor_core.process.lifecycle import kill_session, send_signal, terminate
from arbor_core.process.places import belongs, is_held, lives_in, place_ref
from arbor_core.process.resources import resource_shortage
from arbor_core.process.wakeup import short_address
from arbor_core.storage.background import in_thread
from arbor_core.types import ArborError, AttemptOrder, ExecutorSettings, Placement

log = logging.getLogger(__name__)
FORK_SERVER_SECONDS = 300.0
"""How long importing and proving may take."""
CLOSE_SECONDS = 1.0
"""How long a fork server may take to end on SIGTERM: it has nothing to save."""


@dataclass(frozen=True)
class ForkServerKey:
    """One fork server per interpreter and set of libraries."""

    python: str
    preload: tuple[str, ...]
    prove: str | None


@dataclass
class ForkServer:
    """A live fork server, and how many threads its environment was made for."""

    process: asyncio.subprocess.Process
    socket: Path


class LocalExecutor:
    """Starts attempts by forking a fork server (`start=warm`) or a new interpreter (`cold`)."""

    def __init__(self, settings: ExecutorSettings) -> None:
        self.warm, self.runtime = settings.start == "warm", settings.runtime
        self.fork_servers: dict[ForkServerKey, asyncio.Task[ForkServer]] = {}
        self.faults: dict[ForkServerKey, str] = {}
        self.processes: set[asyncio.subprocess.Process] = set()
        """Every fork server that may still live, whatever became of its task."""
        self.children: set[subprocess.Popen[bytes]] = set()
        """Supervisors that were started cold and have not been reaped."""
        self.started = 0

    def prepare(self, python: str | None, preload: tuple[str, ...], prove: str | None) -> None:
        """Start to warm up for a trainer, without waiting."""
        key = ForkServerKey(python or sys.executable, preload, prove)
        if self.warm and preload and key not in self.faults:
            self.fork_server(key)

    async def start(self, order: AttemptOrder, placement: Placement) -> str:
        """See `Executor.start`."""
        if placement.node:
            names = ", ".join(device.id for device in placement.devices)
            raise ArborError(
                f"executor=local starts attempts on the server's machine, and {names} is on the node "
                f"'{placement.node}': choose an executor that reaches it, or an allocator of this machine's devices"
            )
        env = worker_env(order, placement)
        key = ForkServerKey(order.python, order.preload, order.prove)
        forkable = order.preload and not order.argv and not order.env  # libraries have read their variables already
        if self.warm and forkable and key not in self.faults:
            try:
                pid = await self._fork(await asyncio.shield(self.fork_server(key)), order, env)
                return place_ref(pid, order.dir)
            except OSError as error:  # the fork server has died, or never came up
                if resource_shortage(error):  # no fault of the fork server: a cold start would fail too
                    raise
                self._discard(key)
                log.warning("starting cold: the fork server of %s is not usable: %s", order.preload, error)
            except ForkServerError as error:
                self.faults[key] = str(error)
                log.warning("starting cold from now on: %s", error)
        return self._cold(order, env)

    def _cold(self, order: AttemptOrder, env: Mapping[str, str]) -> str:
        """Start a supervisor in a new interpreter. Not with asyncio: that kills its processes when it forgets them, or
        keeps a thread for each, and this one is to outlive the event loop."""
        self._reap()
        with AttemptDir(order.dir).log.open("ab") as output:
            process = subprocess.Popen(
                [order.python, "-m", "arbor_core.worker.supervisor", str(order.dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd=order.dir,
                start_new_session=True,
            )
        self.children.add(process)
        return place_ref(process.pid, order.dir)

    def _reap(self) -> None:
        self.children = {process for process in self.children if process.poll() is None}

    def fork_server(self, key: ForkServerKey) -> asyncio.Task[ForkServer]:
        task = self.fork_servers.get(key)
        if task is None or lost(task):
            task = self.fork_servers[key] = asyncio.create_task(self._start_fork_server(key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, whoever waits
        return task

    def _discard(self, key: ForkServerKey) -> None:
        """Have no more to do with a fork server that failed us: the next attempt starts another."""
        task = self.fork_servers.pop(key, None)
        if task and not lost(task) and task.done():
            task.result().process.terminate()

    async def _start_fork_server(self, key: ForkServerKey) -> ForkServer:
        self.runtime.mkdir(parents=True, exist_ok=True)
        if not self.started:
            remove_files(self.runtime, "fork-server-*")  # of earlier servers
        self.started += 1
        name = f"fork-server-{os.getpid()}-{self.started}"  # nobody else's: one that ends late removes its own socket
        socket, report = self.runtime / f"{name}.sock", self.runtime / f"{name}.log"
        extra = {"PYTHONHASHSEED": "0", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with report.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                key.python,
                "-m",
                "arbor_core.worker.forkserver",
                str(socket),
                key.prove or "",
                *key.preload,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                env={**clean_env(), **threads_env(os.cpu_count() or 1), **extra},
                start_new_session=True,
            )
        self.processes = {process, *(one for one in self.processes if one.returncode is None)}
        assert process.stdout is not None
        try:
            said = await asyncio.wait_for(process.stdout.readline(), FORK_SERVER_SECONDS)
        except TimeoutError:
            said = b""
        if said != b"ready\n":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 1.0)  # it closed its output: it ends by itself
            await terminate(process)
            if process.returncode == -signal.SIGKILL:  # somebody's deed, and no fault of the libraries
                raise ConnectionResetError(f"the fork server of {', '.join(key.preload)} was killed")
            lines = report.read_text(errors="replace").strip().splitlines()
            why = lines[-1] if lines else f"it was not ready after {FORK_SERVER_SECONDS:.0f} s"
            raise ForkServerError(f"the fork server of {', '.join(key.preload)} failed: {why}")
        return ForkServer(process, socket)

    async def _fork(self, server: ForkServer, order: AttemptOrder, env: Mapping[str, str]) -> int:
        with short_address(server.socket) as address:
            reader, writer = await asyncio.open_unix_connection(address)
        try:
            request = {"dir": str(order.dir), "env": dict(env), "log": str(AttemptDir(order.dir).log)}
            writer.write(json.dumps(request).encode() + b"\n")
            await writer.drain()
            answer = await asyncio.wait_for(reader.readline(), 30)
            if not answer:
                raise ConnectionResetError("the fork server hung up")
            return int(answer)
        finally:
            writer.close()

    async def poll(self, attempts: Mapping[str, Path]) -> Mapping[str, str | None]:
        """The heartbeats of those whose supervisors live, by ref."""
        self._reap()
        return await in_thread(heartbeats, attempts)

    async def signal(self, ref: str, number: int) -> None:
        await in_thread(send_signal, ref, number)

    async def adopt(self, attempt_dir: Path) -> str | None:
        """Who has claimed the attempt; if nobody has, the claim is revoked. In a copy of a storage directory the claim
        is another attempt's, and nobody runs this one, nor ever will."""
        return await in_thread(claimant, AttemptDir(attempt_dir))

    async def end(self, ref: str) -> None:
        """Kill the supervisor's session; the supervisor has killed what left it, unless it was killed itself."""
        await in_thread(kill_session, ref)

    async def close(self) -> None:
        """End the fork servers, also those that still import; attempts go on under their supervisors."""
        for task in self.fork_servers.values():
            task.cancel()
        await asyncio.gather(*self.fork_servers.values(), return_exceptions=True)
        living = [process for process in self.processes if process.returncode is None]
        await asyncio.gather(*(terminate(process, CLOSE_SECONDS) for process in living))
        remove_files(self.runtime, "fork-server-*.sock")  # of those that were killed
        self._reap()


def heartbeats(attempts: Mapping[str, Path]) -> dict[str, str | None]:
    """The last heartbeat of each attempt whose supervisor lives; see `Executor.poll`.

    Raises:
        OSError: it could not be looked up (no descriptors are left, for example).
    """
    return {ref: last_beat(AttemptDir(folder).heartbeat) for ref, folder in attempts.items() if runs(ref, folder)}


def runs(ref: str, folder: Path) -> bool:
    """Whether a supervisor runs the attempt of a directory: it is seen to live, or has claimed and holds the attempt
    from a namespace of its own."""
    return lives_in(ref, folder) or (is_held(folder) and claimant(AttemptDir(folder)) == ref)


def claimant(attempt: AttemptDir) -> str | None:
    """The ref of the supervisor that has begun an attempt of this very directory; see `Executor.adopt`."""
    ref = attempt.revoke_claim()
    return ref if ref and belongs(ref, attempt.path) else None


def remove_files(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)


def lost(task: asyncio.Task[ForkServer]) -> bool:
    """Whether a fork server's start has failed, or the fork server has ended since."""
    if not task.done():
        return False
    return task.cancelled() or task.exception() is not None or task.result().process.returncode is not None


class ForkServerError(Exception):
    """The libraries cannot be preloaded; the message says why."""
