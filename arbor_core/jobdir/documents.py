"""What an attempt reads of its job: `job.json`, its own `order.json`, and `desired`.

Paths in them are relative to the storage directory. `job.json` is written once and holds what decides the outcome;
what an installation decides anew at each attempt (the trainer's function, where the base model is, the interpreter) is
in `order.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.storage.atomic import replace
from arbor_core.storage.codec import decode, encode
from arbor_core.types import PROTOCOL, ArborError, AttemptOrder, Desired, Exit, InputKind, Placement

from .layout import AttemptDir, JobDir


class JobDocument(msgspec.Struct, frozen=True, kw_only=True):
    """`job.json`: all that decides the outcome of a job. Written once."""

    protocol: int = PROTOCOL
    storage: str
    """Identity of the storage directory that the job belongs to."""
    job_id: str
    trainer: str
    config: dict[str, Any]
    model: str | None
    """Weights that the job starts from, where a job of this storage directory has made them: their path in it. None:
    the base model `model_name`, which each attempt finds anew."""
    model_name: str
    """The public name of these weights."""
    adapter: str | None = None
    """Adapter to start from: its path in the storage directory."""
    input: InputKind | None = None
    """What the job learns from; None: see `learns_from`."""
    training_file: str | None
    """Its path in the storage directory; None: the job learns from what clients send."""
    validation_file: str | None = None
    seed: int
    created_at: float
    versions: dict[str, str] = {}
    """Of the installed libraries that matter for the outcome, by distribution."""
    threads: int = 1
    cpu: str = ""
    """Instruction set: AVX2 and AVX-512 give different last bits. Empty: not known."""

    @property
    def learns_from(self) -> InputKind:
        """What the job learns from. Documents of a version before there were commands do not say."""
        return self.input or ("file" if self.training_file else "rollouts")


def import_object(path: str) -> Any:
    """The object that `"package.module:name"` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def object_path(value: Any) -> str:
    """What `import_object` finds a function or class by."""
    return f"{value.__module__}:{value.__qualname__}"


def read_document(job: JobDir) -> JobDocument:
    """A job's document.

    Raises:
        ArborError: it was written by another version of Arbor, and no server has brought it up to date.
    """
    content = job.document.read_bytes()
    if (found := msgspec.json.decode(content)["protocol"]) != PROTOCOL:
        hint = "start a server on the storage directory first: it brings older ones up to date"
        raise ArborError(f"{job.document} has protocol {found}, this version reads {PROTOCOL}: {hint}")
    return decode(content, JobDocument)


def write_order(order: AttemptOrder, placement: Placement) -> None:
    """Write what the attempt's supervisor and worker read. Not durable: a machine that dies takes the attempt along."""
    attempt = AttemptDir(order.dir)
    values = msgspec.to_builtins(order, enc_hook=str)
    del values["dir"]
    if order.bell:
        values["bell"] = relative(Path(order.bell), attempt.job.storage)
    replace(attempt.placement, encode(placement), durable=False)
    replace(attempt.order, msgspec.json.encode(values), durable=False)


def read_order(attempt: AttemptDir) -> AttemptOrder:
    """An attempt's order, its paths absolute."""
    values = msgspec.json.decode(attempt.order.read_bytes())
    bell = values.get("bell")
    values |= {"dir": attempt.path, "bell": str(attempt.job.storage / bell) if bell else None}
    return msgspec.convert(values, AttemptOrder)


def read_placement(attempt: AttemptDir) -> Placement:
    """On which devices an attempt runs."""
    return decode(attempt.placement.read_bytes(), Placement)


def read_exit(attempt: AttemptDir) -> Exit | None:
    """How an attempt ended; None while its supervisor has not said so."""
    try:
        return msgspec.json.decode(attempt.exit.read_bytes(), type=Exit)
    except FileNotFoundError:
        return None


def relative(path: Path, storage: Path) -> str:
    """A path as it is stored: relative to the storage directory if it lies in it, else as it is."""
    return str(path.relative_to(storage)) if path.is_relative_to(storage) else str(path)


def read_desired(job: JobDir) -> Desired:
    """What the job is asked to do now: a level, not a queue.

    Raises:
        ArborError: the file says something else.
    """
    try:
        word = job.desired.read_text().strip()
    except FileNotFoundError:
        return "run"
    if word not in ("run", "pause", "cancel", "finish"):
        raise ArborError(f"{job.desired} says {word!r}; expected run, pause, cancel or finish")
    return word  # type: ignore[return-value]


def upgrade(job: JobDir, storage: str, trainer: str, base: Callable[[str], str]) -> None:
    """Bring a job's documents of protocol 1, which held absolute paths, up to date. Can be repeated after a crash: the
    job's document, which says that all is done, is written last.

    Args:
        storage: Identity of the storage directory.
        trainer: The job's, which was not written down.
        base: Finds a base model by its name; returns its directory or hub id.
    """
    try:
        old = msgspec.json.decode(job.document.read_bytes())
    except FileNotFoundError:  # the server ended before it had written any
        return
    if old["protocol"] != 1:
        return
    model, adapter = inside(old["model"]), inside(old.get("adapter"))
    found = None if model else base(old["model_name"])
    for attempt in job.attempts():
        if attempt.order.exists():
            _upgrade_order(attempt, old, found)
    same = ("config", "model_name", "seed", "created_at", "versions", "threads", "cpu")
    document = JobDocument(
        storage=storage,
        job_id=old["job_id"],
        trainer=trainer,
        model=model,
        adapter=adapter,
        training_file=inside(old["training_file"]),
        validation_file=inside(old["validation_file"]),
        **{name: old[name] for name in same},
    )
    replace(job.document, encode(document))


def _upgrade_order(attempt: AttemptDir, job: dict[str, Any], base: str | None) -> None:
    old = msgspec.json.decode(attempt.order.read_bytes())
    old |= {"entry": job["entry"], "config_type": job["config_type"], "base": base}
    old.pop("dir", None)
    if old.get("bell"):
        old["bell"] = "run/bell"
    if old["argv"]:
        old["argv"][-1] = "."
    replace(attempt.order, msgspec.json.encode(old))


def inside(path: str | None) -> str | None:
    """An absolute path of protocol 1 as it is stored now; None: it is none that lies in a storage directory."""
    parts = Path(path or "").parts
    if len(parts) > 4 and parts[-4] == "jobs" and parts[-2] == "checkpoints":
        return "/".join(parts[-4:])
    return "/".join(parts[-2:]) if len(parts) > 2 and parts[-2] == "files" and parts[-1].startswith("file-") else None
