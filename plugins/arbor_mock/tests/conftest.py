"""Fixtures: a job directory made by hand, run by the real worker; and a real engine process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arbor_mock
import msgspec
import pytest
from arbor_mock import arbor_trainers

from arbor_core import AttemptOrder, Device, EngineSpec, Event, Placement
from arbor_core.config.compose import load_yaml
from arbor_core.engine import EngineProcess
from arbor_core.jobdir.documents import JobDocument, object_path, write_order
from arbor_core.storage.event_log import tail
from arbor_core.types import EventT

CONF = Path(arbor_mock.__file__).parent / "conf"
MODEL = "mock/tiny"


@dataclass
class JobFolder:
    """A job's directory, and its attempts."""

    dir: Path
    trainer: str = "mock"
    attempts: int = 0
    codes: list[int] = field(default_factory=list)

    def desire(self, word: str) -> None:
        (self.dir / "desired").write_text(word)

    def start(self) -> subprocess.Popen[bytes]:
        """Begin the next attempt."""
        self.attempts += 1
        folder = self.dir / "attempts" / str(self.attempts)
        folder.mkdir(parents=True)
        trainer = arbor_trainers()[self.trainer]
        names = {"entry": trainer.entry, "config_type": object_path(trainer.config)}
        order = AttemptOrder(dir=folder, argv=(), env={}, python=sys.executable, base=MODEL, **names)
        write_order(order, Placement((Device("mock:0", "mock"),), 1))
        with (folder / "worker.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "arbor_core.worker.main", str(folder)], stdout=log, stderr=log
            )

    def run(self) -> int:
        """One attempt from beginning to end; returns its exit status."""
        return self.start().wait(120)

    def events(self, kind: type[EventT] = Event, attempt: int | None = None) -> list[EventT]:
        log = self.dir / "attempts" / str(attempt or self.attempts) / "events.jsonl"
        return [event for _, event in tail(log) if isinstance(event, kind)]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobFolder]:
    """`job(steps=5, fault="crash")`: a job directory with twelve rows and these values over the defaults."""

    def make(
        rows: int = 12, seed: int = 7, validation: bool = False, trainer: str = "mock", **values: Any
    ) -> JobFolder:
        folder = tmp_path / f"ftjob-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        data = folder / "train.jsonl"
        message = {
            "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "three words here"}]
        }
        data.write_text("".join(json.dumps(message) + "\n" for _ in range(rows)))
        order = JobDocument(
            storage="storage_x",
            job_id=folder.name,
            trainer=trainer,
            config={**load_yaml(CONF / "trainer" / f"{trainer}.yaml"), **values},
            model=None,
            model_name=MODEL,
            input=arbor_trainers()[trainer].input,
            training_file=str(data),
            validation_file=str(data) if validation else None,
            seed=seed,
            created_at=time.time(),
        )
        (folder / "job.json").write_bytes(msgspec.json.encode(order, enc_hook=str))
        return JobFolder(folder, trainer)

    return make


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[EngineProcess]]]:
    """`await engine(token_seconds=0.1)` starts an engine process; all are ended."""
    started: list[EngineProcess] = []

    async def start(**options: Any) -> EngineProcess:
        spec = EngineSpec(
            model=MODEL,
            path=MODEL,
            dir=tmp_path / f"engine-{len(started)}",
            devices=(Device("mock:0", "mock"),),
            threads=1,
            token="secret",
            options={**load_yaml(CONF / "backend" / "mock.yaml"), **options},
        )
        found = await arbor_mock.MockBackend().start(spec)
        assert isinstance(found, EngineProcess)
        started.append(found)
        return found

    yield start
    for process in started:
        await process.stop()


@pytest.fixture
def adapter(job: Callable[..., JobFolder]) -> Path:
    """The checkpoint of a finished job."""
    done = job(steps=1)
    assert done.run() == 0, os.listdir(done.dir)
    return next((done.dir / "checkpoints").iterdir())
