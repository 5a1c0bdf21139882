"""A job's directory as the server writes it, and its worker run as the supervisor runs it: for tests of trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import msgspec

from arbor_core import plugins
from arbor_core.config import convert
from arbor_core.jobdir import commands, groups, results
from arbor_core.jobdir.checkpoint_requests import ask
from arbor_core.jobdir.documents import JobDocument, object_path, write_order
from arbor_core.jobdir.inbox import Inbox
from arbor_core.jobdir.layout import JobDir
from arbor_core.process.wakeup import wake
from arbor_core.storage.atomic import replace
from arbor_core.storage.codec import encode
from arbor_core.storage.event_log import tail
from arbor_core.types import (
    AttemptOrder,
    CheckpointRequest,
    Desired,
    Device,
    Event,
    EventT,
    Group,
    GroupsSkipped,
    Placement,
    PolicyPublished,
)

from .forks import Process, forks
from .hardware import device

ENV = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}
"""One thread and none that spins: the same numbers each time, on a machine that has other work to do."""
WORKER = "from arbor_core.worker.main import begin; begin()"
ATTEMPT_SECONDS = 300
STOP_SECONDS = 120
"""How long a trainer that waits for clients may take to pause, or to write a checkpoint."""


def write_plain_document(job: JobDir) -> None:
    """The document of a job whose trainer needs neither a model, nor rows, nor a configuration."""
    document = JobDocument(
        storage="storage_test",
        job_id=job.path.name,
        trainer="x",
        config={},
        model=None,
        model_name="m",
        training_file=None,
        seed=0,
        created_at=0,
    )
    replace(job.document, encode(document))


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
    sender: str = ""
    """What makes the sender of its policies; empty: they are files."""
    attempts: int = 0

    def __post_init__(self) -> None:
        found = plugins.load().get("trainers", self.trainer)
        self.dir.mkdir(parents=True)
        values = convert.merged(yaml_of(self.trainer), self.hyperparameters)
        typed = convert.typed(values, found.config, "hyperparameters")
        document = JobDocument(
            storage="storage_test",
            job_id=f"ftjob-{self.dir.name}",
            trainer=self.trainer,
            config=msgspec.to_builtins(typed, enc_hook=str),
            model=None,
            model_name=self.model,
            input=found.input,
            training_file=str(self._write("train.jsonl", self.rows)),
            validation_file=None
            if self.validation_rows is None
            else str(self._write("valid.jsonl", self.validation_rows)),
            seed=self.seed,
            created_at=time.time(),
            adapter=str(self.adapter) if self.adapter else None,
        )
        self.entry, self.config_type = found.entry, object_path(found.config)
        self.preload = found.preload
        self.files.document.write_bytes(encode(document))

    @property
    def files(self) -> JobDir:
        """The paths in it."""
        return JobDir(self.dir)

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = self.dir / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def ask(self, desired: Desired) -> None:
        """Say what is wanted of the job: a level that the worker reads between steps."""
        replace(self.files.desired, desired.encode())

    def send(self, *sent: Group) -> list[int]:
        """Put groups into the inbox, as the server does for a trainer of rollouts; the positions that follow them."""
        box = Inbox(self.files.inbox)
        try:
            ends = box.append([groups.entry(group, 0) for group in sent])
        finally:
            box.close()
        wake(str(self.files.inbox_bell), "inbox")
        return ends

    def command(self, number: int, payload: bytes) -> None:
        """Put a command into the inbox, as the server does for a trainer of commands."""
        box = Inbox(self.files.inbox)
        try:
            box.append([commands.entry(payload, number)])
        finally:
            box.close()
        wake(str(self.files.inbox_bell), "inbox")

    def results(self) -> dict[int, bytes]:
        """The results of commands, by number, as far as they are on the disk."""
        folder = self.files.results
        return {place.number: results.payload(folder, place) for place in results.readable(folder, 0)}

    def request_checkpoint(self, name: str, **metadata: Any) -> None:
        """Ask for a checkpoint by name."""
        ask(self.files, CheckpointRequest(name, metadata))

    def prepare(self) -> Path:
        """The documents of a new attempt; its directory."""
        self.attempts += 1
        folder = self.attempt_dir
        folder.mkdir(parents=True)
        told = [handled for n in range(1, self.attempts) for handled in self.handled(attempt=n)]
        order = AttemptOrder(
            folder,
            (),
            {},
            sys.executable,
            entry=self.entry,
            config_type=self.config_type,
            base=self.model,
            handled=max(told, default=0),
            sender=self.sender,
        )
        write_order(order, Placement(self.devices, 1))
        return folder

    def start(self, die_at: str = "") -> Process:
        """Begin a new attempt, in a fork of a process that has imported what the trainer names as `preload`, or, if it
        names nothing, in a new Python.

        Args:
            die_at: The fault point at which its process is killed (`arbor_core.crash_points`), and `:3` if that is when
                it comes there the third time.
        """
        folder = self.prepare()
        with self.files.attempt(self.attempts).log.open("wb") as log:
            env = {**os.environ, **ENV}
            dying = {**env, "ARBOR_CRASH_AT": die_at} if die_at else env
            if self.preload:
                return forks(self.preload, env).start(WORKER, [str(folder)], env=dying, stdout=log, stderr=log)
            command = [sys.executable, "-m", "arbor_core.worker.main", str(folder)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=dying)

    def attempt(self, die_at: str = "") -> int:
        """Run a new attempt to its end; its exit status."""
        process = self.start(die_at)
        try:
            return process.wait(ATTEMPT_SECONDS)
        finally:
            process.kill()
            process.wait()

    @property
    def attempt_dir(self) -> Path:
        """The newest attempt's directory."""
        return self.files.attempt(self.attempts).path

    @property
    def log(self) -> str:
        """What the newest attempt printed."""
        return self.files.attempt(self.attempts).log.read_text(errors="replace")

    @overload
    def events(self, *, attempt: int | None = None) -> list[Event]: ...
    @overload
    def events(self, *kinds: type[EventT], attempt: int | None = None) -> list[EventT]: ...
    def events(self, *kinds: type[Event], attempt: int | None = None) -> Sequence[Event]:
        """What an attempt reported (default: the newest), all of it or of some kinds (`MetricsEvent`, ...)."""
        path = self.files.attempt(attempt or self.attempts).events
        return [event for _, event in tail(path) if isinstance(event, kinds or Event)]

    def handled(self, attempt: int | None = None) -> list[int]:
        """What an attempt said of how many groups it had handled, each time."""
        events = self.events(attempt=attempt)
        return [event.handled for event in events if isinstance(event, PolicyPublished | GroupsSkipped)]


def yaml_of(trainer: str) -> dict[str, Any]:
    """A trainer's YAML as its plugin ships it, without Hydra's composition.

    Raises:
        AssertionError: no installed plugin has `conf/trainer/<name>.yaml`.
    """
    folders = [plugin.config_dir for plugin in plugins.installed()]
    paths = [folder / "trainer" / f"{trainer}.yaml" for folder in folders if folder]
    found = [path for path in paths if path.is_file()]
    assert found, f"no plugin has conf/trainer/{trainer}.yaml inside its package: the defaults of its keys go there"
    return convert.load_yaml(found[0])
