"""A job's directory as the server writes it, and its worker run as the keeper runs it: for tests of trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import plugins
from arbor_core.config import compose, convert
from arbor_core.jobdir.checkpoint_requests import ask
from arbor_core.jobdir.documents import WorkOrder
from arbor_core.jobdir.inbox import Inbox
from arbor_core.process.wakeup import ring
from arbor_core.storage.atomic import replace
from arbor_core.storage.codec import encode
from arbor_core.storage.event_log import tail
from arbor_core.types import PROTOCOL, CheckpointRequest, Desired, Device, Event, EventType, Group, Order, Placement

from .hardware import device

ENV = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}
"""One thread and none that spins: the same numbers each time, on a machine that has other work to do."""
ATTEMPT_SECONDS = 300


@dataclass
class JobDirectory:
    """A job of an installed trainer.

    Args:
        dir: Made here; must not be there yet.
        trainer: Its name.
        rows: The training file's rows.
        model: Directory, hub id or whatever the trainer takes as a base model.
        hyperparameters: Laid over the trainer's YAML, as a request's are.
        validation_rows: The validation file's rows; None: there is no validation file.
        devices: The devices of all ranks; default: the one that tests run on (`device`).
        adapter: Adapter to start from.

    Raises:
        ArborError: there is no such trainer, or its configuration does not take the hyperparameters.
    """

    dir: Path
    trainer: str
    rows: Sequence[Mapping[str, Any]]
    model: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    validation_rows: Sequence[Mapping[str, Any]] | None = None
    seed: int = 1
    devices: tuple[Device, ...] = field(default_factory=lambda: (device(),))
    adapter: Path | None = None
    attempts: int = 0

    def __post_init__(self) -> None:
        found = plugins.load().get("trainers", self.trainer)
        self.dir.mkdir(parents=True)
        values = compose.merged(yaml_of(self.trainer), self.hyperparameters)
        typed = convert.typed(values, found.config, "hyperparameters")
        order = WorkOrder(
            protocol=PROTOCOL,
            job_id=f"ftjob-{self.dir.name}",
            entry=found.entry,
            config_type=f"{found.config.__module__}:{found.config.__qualname__}",
            config=msgspec.to_builtins(typed, enc_hook=str),
            check_row=found.check_row,
            min_rows=1,
            model=self.model,
            model_name=self.model,
            training_file=self._write("train.jsonl", self.rows),
            validation_file=None if self.validation_rows is None else self._write("valid.jsonl", self.validation_rows),
            seed=self.seed,
            created_at=time.time(),
            versions={},
            threads=1,
            cpu="",
            adapter=self.adapter,
        )
        (self.dir / "job.json").write_bytes(encode(order))

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = self.dir / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def ask(self, desired: Desired) -> None:
        """Say what is wanted of the job: a level that the worker reads between steps."""
        replace(self.dir / "desired", desired.encode())

    def send(self, *groups: Group) -> list[int]:
        """Put groups into the inbox, as the server does for a trainer of rollouts; the positions that follow them."""
        box = Inbox(self.dir / "inbox")
        try:
            ends = box.append([(group, 0) for group in groups])
        finally:
            box.close()
        ring(str(self.dir / "inbox" / "bell"), "inbox")
        return ends

    def request_checkpoint(self, name: str, **metadata: Any) -> None:
        """Ask for a checkpoint by name."""
        ask(self.dir, CheckpointRequest(name, metadata))

    def prepare(self) -> Path:
        """The papers of a new attempt; its directory."""
        self.attempts += 1
        folder = self.attempt_dir
        folder.mkdir(parents=True)
        (folder / "placement.json").write_bytes(encode(Placement(self.devices, 1)))
        told = [e.data["handled"] for n in range(1, self.attempts) for e in self.events("weights", attempt=n)]
        order = Order(folder, (), {}, sys.executable, handled=max(told, default=0))
        (folder / "order.json").write_bytes(encode(order))
        return folder

    def start(self) -> subprocess.Popen[bytes]:
        """Begin a new attempt, in a new Python."""
        folder = self.prepare()
        with (folder / "worker.log").open("wb") as log:
            command = [sys.executable, "-m", "arbor_core.worker.main", str(folder)]
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENV})

    def attempt(self) -> int:
        """Run a new attempt to its end; its exit status."""
        process = self.start()
        try:
            return process.wait(ATTEMPT_SECONDS)
        finally:
            process.kill()
            process.wait()

    @property
    def attempt_dir(self) -> Path:
        """The newest attempt's directory."""
        return self.dir / "attempts" / str(self.attempts)

    @property
    def log(self) -> str:
        """What the newest attempt printed."""
        return (self.attempt_dir / "worker.log").read_text(errors="replace")

    def events(self, *types: EventType, attempt: int | None = None) -> list[Event]:
        """What an attempt reported (default: the newest), all of it or of some types."""
        path = self.dir / "attempts" / str(attempt or self.attempts) / "events.jsonl"
        return [event for _, event in tail(path, 0, Event) if not types or event.type in types]


def yaml_of(trainer: str) -> dict[str, Any]:
    """A trainer's YAML as its plugin ships it, without Hydra's composition.

    Raises:
        AssertionError: no installed plugin has `conf/trainer/<name>.yaml`.
    """
    folders = [plugin.config_dir for plugin in plugins.installed()]
    paths = [folder / "trainer" / f"{trainer}.yaml" for folder in folders if folder]
    found = [path for path in paths if path.is_file()]
    assert found, f"no plugin has conf/trainer/{trainer}.yaml inside its package: the defaults of its keys go there"
    return compose.load_yaml(found[0])
