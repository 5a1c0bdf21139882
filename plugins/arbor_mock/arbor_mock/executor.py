"""The executor `mock`: attempts without processes, so that one machine can simulate a thousand devices.

Each attempt is a task in the server's event loop that does what `arbor_mock.train` does and writes the files that a
supervisor and a worker would write; a few threads do the writing, because a disk may be slow. Nothing is forced to the
disk, and attempts end with the server: the next one starts them again from their last checkpoints. Only the trainer
`mock` can be run like this.
"""

import asyncio
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from arbor_core import (
    MANIFEST,
    AttemptDir,
    AttemptOrder,
    Checkpoint,
    CheckpointEvent,
    Event,
    ExecutorSettings,
    Exit,
    FileWorkerRun,
    JobFailed,
    JobStopped,
    Manifest,
    PausedEvent,
    Placement,
    explain,
    fail,
    last_beat,
    manifest,
    newest_first,
    open_run,
    replace,
    wake,
)

from .config import MockConfig
from .train import steps

T = TypeVar("T")
ENTRY = "arbor_mock.train:train"
THREADS = 8


class Killed(BaseException):
    """The simulated process was sent this signal; not an Exception, so that no trainer can catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SimulatedRun(FileWorkerRun[MockConfig]):
    """A run whose files are written and never forced to the disk, and held open by nobody."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log is not None:
            self.log.close()

    def emit(self, event: Event) -> None:
        event.at = time.time()
        with self.files.events.open("ab", buffering=0) as file:
            file.write(msgspec.json.encode(event) + b"\n")
        wake(self.bell, self.job_id)

    @contextmanager
    def checkpoint(self, step: int, /, **metrics: float) -> Iterator[Path]:
        name = f"{step}-{self.attempt}"
        folder = self.checkpoints_dir / name
        temporary = folder.with_name(f"{name}.tmp")
        temporary.mkdir(parents=True)
        yield temporary
        vouched = Manifest(step, self.attempt, metrics, {})
        (temporary / MANIFEST).write_bytes(msgspec.json.encode(vouched))
        temporary.rename(folder)
        self.emit(CheckpointEvent(f"Checkpoint created at step {step}", step=step, dir=name, metrics=metrics))

    def write_resume_point(self, step: int, write: Callable[[Path], None], /, **metrics: float) -> bool:
        return False  # the simulation goes on from checkpoints

    def last_checkpoint(self) -> Checkpoint | None:
        for folder in newest_first(self.checkpoints_dir):
            if saved := manifest(folder):
                return Checkpoint(saved.step, folder, saved.metrics)
        return None


class SimulatedExecutor:
    """See `arbor_core.Executor`. A ref is `mock:<job>:<attempt>:<random>`."""

    def __init__(self, settings: ExecutorSettings) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.signals: dict[str, int] = {}
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="simulation")

    def prepare(self, python: str | None, preload: tuple[str, ...], prove: str | None) -> None:
        """There is nothing to warm up."""

    async def start(self, order: AttemptOrder, placement: Placement) -> str:
        ref = f"mock:{order.dir.parent.parent.name}:{order.dir.name}:{secrets.token_hex(4)}"
        if await self.call(AttemptDir(order.dir).claim, ref) == ref:
            task = self.tasks[ref] = asyncio.create_task(self._keep(ref, order))
            task.add_done_callback(lambda _: self.tasks.pop(ref, None))
        return ref

    async def poll(self, attempts: Mapping[str, Path]) -> Mapping[str, str | None]:
        living = {ref: folder for ref, folder in attempts.items() if ref in self.tasks}
        beats = await self.call(lambda: {ref: last_beat(AttemptDir(living[ref]).heartbeat) for ref in living})
        return {ref: beat for ref, beat in beats.items() if ref in self.tasks}

    async def signal(self, ref: str, number: int) -> None:
        if task := self.tasks.get(ref):
            self.signals[ref] = number
            task.cancel()

    async def adopt(self, attempt_dir: Path) -> str | None:
        return await self.call(AttemptDir(attempt_dir).revoke_claim) or None

    async def end(self, ref: str) -> None:
        """Cancel the attempt, which then ends without a word."""
        if task := self.tasks.get(ref):
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Attempts end without a word, as with a machine that loses its power."""
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.threads.shutdown()

    async def call(self, function: Callable[..., T], *values: Any) -> T:
        """Call a function that reads or writes files in a thread; returns when it has ended, even if cancelled."""
        called = asyncio.get_running_loop().run_in_executor(self.threads, function, *values)
        try:
            return await asyncio.shield(called)
        except asyncio.CancelledError:
            await asyncio.wait([called])
            raise

    async def _keep(self, ref: str, order: AttemptOrder) -> None:
        """Be the attempt's worker, then its supervisor."""
        try:
            code = await self._work(order.dir)
        except asyncio.CancelledError:
            if ref not in self.signals:
                raise
            code = -self.signals.pop(ref)
        await self.call(end, AttemptDir(order.dir), code)
        wake(order.bell, order.dir.parent.parent.name)

    async def _work(self, attempt_dir: Path) -> int:
        """What the worker's process does; returns its exit status."""
        run = await self.call(open_run, attempt_dir, SimulatedRun)
        try:
            if run.order.entry != ENTRY:
                raise JobFailed("executor=mock runs the trainer 'mock' and no other", code="worker_not_started")
            training = steps(run, die)
            while (seconds := await self.call(next, training, None)) is not None:  # noqa: ASYNC110 - a step's time
                await asyncio.sleep(seconds)
        except JobStopped as stop:
            if stop.desired == "pause":
                run.emit(PausedEvent("The job is paused", code=None))
            return 0
        except Killed as killed:
            if killed.number == signal.SIGSTOP:
                await asyncio.get_running_loop().create_future()  # until somebody ends it
            return -killed.number
        except JobFailed as error:
            fail(run, str(error), error.code, error.param)
        except Exception as error:  # as in a real worker
            return explain(run, error)
        else:
            return 0
        return 1


def end(attempt: AttemptDir, code: int) -> None:
    """Tidy up and write how the attempt ended."""
    shutil.rmtree(attempt.work, ignore_errors=True)
    replace(attempt.exit, msgspec.json.encode(Exit(code, time.time())), durable=False)


def die(number: int) -> None:
    """What `os.kill` is to a process."""
    raise Killed(number)
