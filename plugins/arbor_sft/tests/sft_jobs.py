"""Job directories for the tests, and the worker that runs them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from arbor_sft import SftConfig, arbor_trainers

from arbor_core.config.convert import load_yaml, merged, typed
from arbor_core.jobdir.documents import JobDocument, write_order
from arbor_core.storage.codec import encode
from arbor_core.storage.event_log import tail
from arbor_core.testing import device
from arbor_core.testing.forks import Process, forks
from arbor_core.testing.job_directory import WORKER
from arbor_core.types import AttemptOrder, Event, EventT, MetricsEvent, Placement, ResultEvent

ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # else each question to a hub that is not there is asked again and again
}
DEFAULTS = load_yaml(Path(str(files("arbor_sft") / "conf/trainer/sft.yaml"))) | {"dtype": "float32"}
PATIENCE = 300
"""Seconds that an attempt may take, on a machine that has other work to do."""
FULL = {"lora": None, "learning_rate": 3e-3, "batch_size": 4, "n_epochs": 1}


def config(hyperparameters: dict[str, Any]) -> SftConfig:
    return typed(merged(DEFAULTS, hyperparameters), SftConfig, "hyperparameters")


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Job:
    """A job directory. `attempt()` runs the worker in it as the supervisor would."""

    dir: Path
    model: Path
    training_file: Path
    validation_file: Path | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 1
    attempts: int = 0
    entry: str = "arbor_sft.train:train"
    share: float = 1.0

    def __post_init__(self) -> None:
        self.dir.mkdir(parents=True)
        order = JobDocument(
            storage="storage_x",
            job_id="ftjob-test",
            trainer="sft",
            config=merged(DEFAULTS, self.hyperparameters),
            model=None,
            model_name="tiny",
            training_file=str(self.training_file),
            validation_file=str(self.validation_file) if self.validation_file else None,
            seed=self.seed,
            created_at=time.time(),
        )
        (self.dir / "job.json").write_bytes(encode(order))

    def start(self, *, cold: bool = False, ranks: int = 1) -> Worker:
        """A new attempt: a fork of a process that has imported the libraries, or a new Python, or several."""
        self.attempts += 1
        folder = self.dir / "attempts" / str(self.attempts)
        folder.mkdir(parents=True)
        names = {"entry": self.entry, "config_type": "arbor_sft:SftConfig"}
        order = AttemptOrder(folder, (), {}, sys.executable, base=str(self.model), **names)
        write_order(order, Placement((device(),), 1, self.share))
        env = {**os.environ, **ENV}
        with (folder / "worker.log").open("wb") as log:
            if not cold and ranks == 1:
                parent = forks(arbor_trainers()["sft"].preload, env)
                return Worker(parent.start(WORKER, [str(folder)], env=env, stdout=log, stderr=log))
            torchrun = ["-m", "arbor_core.worker.torchrun", f"--nproc-per-node={ranks}"] if ranks > 1 else []
            command = [sys.executable, *torchrun, "-m", "arbor_core.worker.main", str(folder)]
            return Worker(subprocess.Popen(command, stdout=log, stderr=log, env=env))

    def attempt(self, *, cold: bool = False) -> int:
        """Run an attempt to its end; the exit status."""
        return self.start(cold=cold).wait()

    def run(self, *, cold: bool = False) -> Job:
        """An attempt that must succeed."""
        assert self.attempt(cold=cold) == 0, self.log()
        return self

    def log(self) -> str:
        return (self.dir / "attempts" / str(self.attempts) / "worker.log").read_text()

    def events(self, kind: type[EventT] = Event, attempt: int | None = None) -> list[EventT]:
        path = self.dir / "attempts" / str(attempt or self.attempts) / "events.jsonl"
        return [event for _, event in tail(path) if isinstance(event, kind)]

    def event(self, kind: type[EventT]) -> EventT:
        (event,) = self.events(kind)
        return event

    def curve(self, name: str = "train_loss", attempt: int | None = None) -> list[float]:
        return [e.data[name] for e in self.events(MetricsEvent, attempt) if name in e.data]

    def digests(self, attempt: int | None = None) -> dict[int, str]:
        """What stands for the parameters after each step of an attempt."""
        return {e.data["step"]: e.data["digest"] for e in self.events(MetricsEvent, attempt)}

    def result(self) -> Path:
        return self.dir / "checkpoints" / self.event(ResultEvent).dir

    def digest(self) -> str:
        """SHA-256 of the final weights."""
        names = ("model.safetensors", "adapter_model.safetensors")
        path = next(self.result() / name for name in names if (self.result() / name).exists())
        return hashlib.sha256(path.read_bytes()).hexdigest()


class Worker:
    """A running attempt."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


def until(worker: Worker, job: Job, kind: type[Event], count: int = 1) -> None:
    """Wait until the running attempt has reported `count` events of a kind."""
    for _ in polls(PATIENCE):
        ended = worker.ended()  # before its events: after its end come no more
        if len(job.events(kind)) >= count:
            return
        assert not ended, job.log()
    raise AssertionError(f"no {kind.__name__} within {PATIENCE} s: {job.log()}")


def polls(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.01)
