"""`make chaos`: a server with real jobs, of which anything is killed, paused, cancelled or left half done, for minutes.

    python tests/support/chaos.py [--minutes 1] [--seed N] [--disk] [--keep DIR]

Before it begins, one job of each kind runs undisturbed: its twins in the chaos must report the same digest of the
parameters after every step. Afterwards every job is brought to an end and `chaos_checks` looks at what is left.
`--disk` puts the storage on a small disk (needs root) that is full now and then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from chaos_checks import digests, of_replays, read, supervisors, violations
from chaos_clients import Clients, Kind, training_rows
from chaos_commands import EXECUTING
from chaos_rollouts import LEARNING, LEARNING_REAL
from http_calls import JOBS
from live import LiveServer, launch

from arbor_core.jobdir.layout import JobDir
from arbor_core.jobs.states import NOT_ENDED
from arbor_core.testing.invariants import Seen, check_invariants, processes

LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "learning_rate": 1e-2}
SHARED = {"batch_size": 4, "micro_batch_size": 2, "n_epochs": 6, "checkpoint_steps": 5}
REAL: list[Kind] = [
    ("supervised", {**SHARED, **LORA, "batching": "sorted", "keep_checkpoints": 3}),
    ("supervised", {**SHARED, **LORA, "batching": "packed", "keep_checkpoints": 2}),
    ("supervised", {**SHARED, "lora": None, "learning_rate": 3e-3, "batching": "packed", "keep_checkpoints": 1}),
]
MOCK: list[Kind] = [
    ("mock", {"steps": 60, "step_seconds": 0.05, "checkpoint_steps": 7}),
    ("mock", {"steps": 30, "step_seconds": 0.02, "checkpoint_steps": 10, "fault": "crash", "fault_step": 12}),
    ("mock", {"steps": 20, "step_seconds": 0.1, "checkpoint_steps": 3, "fault": "bad_checkpoint", "fault_step": 8}),
]
HANG = ("limits.engine_heartbeat_seconds=4", "limits.heartbeat_seconds=15", "limits.start_seconds=40")
"""What stands still is ended so soon; what works on a machine that others load is not."""
OPTIONS = ("+trainer=sft", "inference=mock", "gpu.train=[0,1]", "threads=1", "limits.attempts=1000", *HANG)
SEGMENTS = {"ARBOR_SEGMENT_BYTES": "2000"}
"""Logs of inboxes and results have many segments."""
PAUSE_SECONDS = 0.2
"""Mean time between two deeds."""
PATIENCE = 300.0
"""Seconds without any change after which the jobs that are left are stuck."""


class Chaos(Clients):
    """One run on one storage directory."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        real: list[Kind] = REAL,
        mock: list[Kind] = MOCK,
        live: list[Kind] = LEARNING + LEARNING_REAL + EXECUTING,
        most: int = 7,
    ) -> None:
        super().__init__(seed)
        self.folder, self.real, self.mock, self.live, self.most = folder, real, mock, live, most
        self.filling: threading.Thread | None = None
        tiny = folder / "models" / "tiny"
        subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(tiny)], check=True, capture_output=True)
        self.server = self.start()
        self.seen = Seen(self.server.storage)
        self.rows = self.upload(training_rows())

    def start(self) -> LiveServer:
        models = f"models.dirs=[{self.folder / 'models'}]"
        env = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false", **SEGMENTS}
        return launch(self.folder, models, *OPTIONS, mock=False, env=env)

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def end_server(self, number: int) -> None:
        self.server.stop(number)
        self.counts[f"server: {signal.Signals(number).name}"] += 1
        time.sleep(self.draw.uniform(0, 1.5))
        while True:
            full = self.disk_is_full()
            try:
                self.server = self.start()
                break
            except RuntimeError:
                if not full:
                    raise
                self.counts["starts refused for lack of room"] += 1
        self.seen.look()

    def kill(self, what: str, found: list[int], number: int = signal.SIGKILL) -> None:
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.draw.choice(found), number)
                self.counts[f"{what} {'killed' if number == signal.SIGKILL else 'stopped'}"] += 1

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        workers = []
        for supervisor in supervisors(self.server.storage):
            with contextlib.suppress(OSError):
                workers += map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split())
        self.kill("worker", workers, number)

    def kill_module(self, module: str, number: int = signal.SIGKILL) -> None:
        named = {pid: line for pid, line in processes(self.server.storage).items() if module in line}
        parents = {pid for pid in named if parent_of(pid) == self.server.process.pid}  # not its forks
        self.kill(module.rpartition(".")[2], sorted(parents), number)

    def let_engines_go_on(self) -> None:
        """One that was stopped while it started is given minutes, and what waits for it stays as long."""
        for pid, line in processes(self.server.storage).items():
            if "arbor_mock.engine" in line:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def fill_disk(self) -> None:
        if not self.disk_is_full():
            seconds = self.draw.uniform(0.2, 4.0)
            self.filling = threading.Thread(target=keep_full, args=(self.folder / "filler", seconds))
            self.filling.start()
            self.counts["disk full"] += 1

    def disk_is_full(self) -> bool:
        return self.filling is not None and self.filling.is_alive()

    # --- the run ------------------------------------------------------------------------------------------------------

    def twins(self) -> None:
        """Jobs of each kind without any disturbance: what the others are compared with."""
        for kind in (*self.real, *self.mock):
            calm = {name: value for name, value in kind[1].items() if not name.startswith("fault")}
            job_id = self.create((kind[0], calm))
            self.wait_for(lambda job_id=job_id: job_id in self.jobs("succeeded", "failed"), f"twin {job_id}")
            self.ledger.twins[json.dumps(kind)] = digests(self.server.storage, job_id)

    def few(self) -> bool:
        """Whether there is room for another job."""
        return len(self.jobs()) < self.most

    def deeds(self, disk: bool) -> list[tuple[float, Callable[[], object]]]:
        """What may happen next, and how likely it is."""
        create = lambda kinds: lambda: self.few() and self.create(self.draw.choice(kinds))  # noqa: E731
        play = lambda kinds: lambda: self.few() and self.play(self.draw.choice(kinds))  # noqa: E731
        return [
            *([(8, create(self.real))] if self.real else []),
            *([(6, create(self.mock))] if self.mock else []),
            *([(10, play(self.live))] if self.live else []),
            (5, lambda: self.ask_of_job("pause")),
            (12, lambda: self.ask_of_job("resume")),
            (1, lambda: self.ask_of_job("cancel")),
            (1.5, lambda: self.end_server(signal.SIGKILL)),
            (0.5, lambda: self.end_server(signal.SIGTERM)),
            (4, lambda: self.kill("supervisor", supervisors(self.server.storage))),
            (8, self.kill_worker),
            (1.5, lambda: self.kill_worker(signal.SIGSTOP)),
            (0.8, lambda: self.kill_module("arbor_core.worker.forkserver")),
            (3, lambda: self.kill_module("arbor_core.data.validator")),
            (4, lambda: self.kill_module("arbor_mock.engine")),
            (2, lambda: self.kill_module("arbor_mock.engine", signal.SIGSTOP)),
            (4, self.upload_cut_short),
            (4, lambda: self.upload(self.draw.randbytes(self.draw.randrange(1, 300_000)))),
            (6, self.slow_client),
            *([(2, self.fill_disk)] if disk else []),
        ]

    def run(self, seconds: float, disk: bool = False) -> list[str]:
        """Disturb for so long, then let everything end; returns what does not hold."""
        self.lossy = disk
        self.twins()
        self.kill_module("arbor_core.worker.forkserver")
        weights, deeds = zip(*self.deeds(disk), strict=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.draw.choices(deeds, weights)[0]()
            time.sleep(self.draw.expovariate(1 / PAUSE_SECONDS))
        if self.filling:
            self.filling.join()
        self.let_engines_go_on()
        self.wait_for(self.all_ended, "the jobs")
        for thread in (*self.slow, *self.job_clients.values()):
            thread.join(PATIENCE)
        found = violations(self.server, self.ledger, self.counts)
        for client in self.job_clients.values():
            found += client.violations(self.server.storage)
        assert self.server.stop() == 0
        found += self.ledger.faults
        try:
            self.seen.look()
            check_invariants(self.server.storage)
        except AssertionError as error:
            found.append(str(error))
        return found + list(of_replays(self.server.storage, self.counts))

    def all_ended(self) -> bool:
        self.end_live_jobs()
        for job_id in self.jobs("paused"):
            self.ask("POST", f"{JOBS}/{job_id}/resume")
        answer = self.ask("GET", "/health")
        return answer is not None and not self.jobs()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait as long as jobs get on, however slow the machine is."""
        left, seen = self.not_ended(), time.monotonic()
        while not condition():
            if (now := self.not_ended()) != left:
                left, seen = now, time.monotonic()
            if time.monotonic() - seen > PATIENCE:
                raise AssertionError(
                    f"{what} did not come to an end, and nothing changed for {PATIENCE:.0f} s: {left}\n"
                    f"{self.said(job[0] for job in left)}\n{self.server.log[-3000:]}"
                )
            time.sleep(0.3)

    def not_ended(self) -> list[Any]:
        """The jobs that have not ended, and how far each has got."""
        sql = "SELECT id, status, desired, attempt, crashes, progress, offset, json_extract(spec,'$.trainer') FROM jobs"
        return read(self.server.storage, f"{sql} WHERE {NOT_ENDED}")

    def said(self, jobs: Iterable[str]) -> str:
        """The last that the newest attempt of each job has printed."""
        newest = [(job, JobDir.of(self.server.storage, job).attempts()[-1:]) for job in jobs]
        logs = [(job, attempt.log) for job, attempts in newest for attempt in attempts if attempt.log.exists()]
        return "\n".join(f"{job}: {log.read_text(errors='replace')[-500:]}" for job, log in logs)

    def close(self) -> None:
        """Leave no process, whatever happened."""
        self.server.stop(signal.SIGKILL)
        for pid in processes(self.server.storage):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def keep_full(filler: Path, seconds: float) -> None:
    """Leave no room on a file's disk, for so long."""
    end = time.monotonic() + seconds
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < end:
            try:
                file.write(bytes(1 << 16))
            except OSError:  # full; what the others free is taken as well
                time.sleep(0.01)
    filler.unlink()


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool, minutes: float) -> Iterator[None]:
    """Some memory that can be filled without harm to anybody else; an hour's checkpoints take more of it."""
    if not wanted:
        yield
        return
    size = f"size={1 + round(minutes / 8)}g"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--minutes", type=float, default=float(os.environ.get("CHAOS_MINUTES", "1")))
    parse.add_argument("--seed", type=int, default=int(os.environ.get("CHAOS_SEED", random.randrange(1 << 30))))
    parse.add_argument("--disk", action="store_true", help="fill the disk now and then; needs root")
    parse.add_argument("--keep", type=Path, help="work in this directory and leave it there")
    given = parse.parse_args()
    with tempfile.TemporaryDirectory(prefix="arbor-chaos-") as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with small_disk(folder, given.disk, given.minutes):
            chaos = Chaos(folder, given.seed)
            try:
                print(f"chaos: seed {given.seed}, {given.minutes:g} minutes", flush=True)
                found = chaos.run(given.minutes * 60, given.disk)
            finally:
                chaos.close()
    for name, count in sorted(chaos.counts.items()):
        print(f"{count:7d} {name}")
    for violation in found:
        print(f"VIOLATION {violation}")
    print("nothing was lost" if not found else f"{len(found)} violations; again with --seed {given.seed}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
