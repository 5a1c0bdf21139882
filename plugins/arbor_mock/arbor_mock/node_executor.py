"""The executor `mock_node`: attempts run on a machine that the server reaches over a socket and in no other way, as on
a cluster. The machine is simulated by a process (`node.py`), which is started when it is needed; their workers are real
and run any trainer."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import ArborError, AttemptOrder, ExecutorSettings, Placement, clean_env, short_address, worker_env

from .config import NODE
from .node import BOOT_SECONDS, LINE_BYTES, LOOK_SECONDS, SOCKET

ANSWER_SECONDS = 10.0
DOWN = (ConnectionError, FileNotFoundError)
"""What a call raises when the machine is down."""


class NodeExecutor:
    """See `arbor_core.Executor`. A ref is what the node calls an attempt."""

    def __init__(self, settings: ExecutorSettings) -> None:
        self.folder = settings.runtime / "node"
        self.booted: subprocess.Popen[bytes] | None = None

    def prepare(self, python: str | None, preload: tuple[str, ...], prove: str | None) -> None:
        """There is nothing to warm up."""

    async def start(self, order: AttemptOrder, placement: Placement) -> str:
        if placement.node != NODE:
            raise ArborError(f"executor=mock_node starts attempts on '{NODE}', not on '{placement.node}'")
        worker = (order.python, "-m", "arbor_core.worker.main", str(order.dir))
        limits = {"grace": order.grace, "room": order.room_seconds}
        env, argv = worker_env(order, placement), order.argv or worker
        return str(await self.call("start", attempt=str(order.dir), argv=argv, env=env, bell=order.bell, **limits))

    async def poll(self, attempts: Mapping[str, Path]) -> Mapping[str, str | None]:
        try:
            beats: dict[str, str | None] = await self.ask("poll", refs=list(attempts))
        except DOWN:  # and its attempts with it
            return {}
        return beats

    async def signal(self, ref: str, number: int) -> None:
        with contextlib.suppress(*DOWN):
            await self.ask("signal", ref=ref, number=number)

    async def adopt(self, attempt_dir: Path) -> str | None:
        return await self.call("adopt", attempt=str(attempt_dir)) or None

    async def end(self, ref: str) -> None:
        await self.call("end", ref=ref)

    async def close(self) -> None:
        """Nothing is held: the node lives on its own."""

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Call the node.

        Raises:
            ConnectionError, FileNotFoundError: it is down (`DOWN`).
            OSError: it cannot do that, or does not answer.
        """
        async with asyncio.timeout(ANSWER_SECONDS):
            with short_address(self.folder / SOCKET) as address:
                reader, writer = await asyncio.open_unix_connection(address, limit=LINE_BYTES)
            try:
                writer.write(msgspec.json.encode({"do": do, **arguments}) + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the node hung up")
        answer = msgspec.json.decode(line)
        if "error" in answer:
            raise OSError(f"the node cannot {do}: {answer['error']}")
        return answer["answer"]

    async def call(self, do: str, **arguments: Any) -> Any:
        """Call the node; start it if it is down.

        Raises:
            OSError: it does not answer, or cannot do that.
        """
        deadline = asyncio.get_running_loop().time() + BOOT_SECONDS
        while True:
            try:
                return await self.ask(do, **arguments)
            except DOWN:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            self.boot()
            await asyncio.sleep(LOOK_SECONDS)

    def boot(self) -> None:
        """Start the node's process, unless one that we started is about to answer, or to end."""
        if self.booted is None or self.booted.poll() is not None:
            self.booted = start_node(self.folder)


def start_node(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that simulates a machine; it needs nobody who waits for it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "arbor_mock.node", str(folder)]
    with (folder / "node.log").open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=clean_env(), start_new_session=True
        )
