"""The models that jobs have trained, by the names that completions and other jobs use.

`ft:...` names a result or a checkpoint. A job's id names what the job is at: while it learns from rollouts, its newest
published policy; after its end, its result, or its newest checkpoint where it has none. `<job id>:<name>` is the
checkpoint that a client gave that name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from arbor_core.jobdir.layout import JobDir, checkpoint_path
from arbor_core.jobs.policies import newest_policy, sent_policy
from arbor_core.jobs.records import trains_all_weights
from arbor_core.jobs.states import LIVE, NOT_ENDED
from arbor_core.storage.database import Store
from arbor_core.types import TERMINAL, ApiError, InputKind, Status, Weights

JOB = "ftjob-"
"""What the ids of jobs begin with; no base model is called so."""
Kind = Literal["adapter", "full"]
WITH_PARENT = """
    SELECT m.*, coalesce(json_extract(j.spec, '$.parent'), m.base) AS parent
    FROM models m JOIN jobs j ON j.id=m.job_id"""
"""The rows of `models`, each with the model that its job began with."""


class ModelRow(msgspec.Struct, frozen=True):
    """One row of `models`: a model that a job has trained. Paths are relative to the storage directory."""

    name: str
    owner: str
    job_id: str
    base: str
    base_path: str
    """Empty: `base` is a base model, which is looked for anew whenever it is needed."""
    path: str
    """Empty: as `base_path`."""
    kind: Kind
    created_at: int


class FullPolicy(msgspec.Struct, frozen=True):
    """Weights that a job's own engine has to have, or newer ones."""

    path: str
    version: int
    sent: dict[str, Any] | None = None
    """What a sender returned of them; None: they are at `path`."""

    @property
    def stored(self) -> bool:
        """Whether they are a version on the disk, which its trainer removes when there are newer ones."""
        return self.version > 0 and self.sent is None


class Resolved(msgspec.Struct, frozen=True):
    """How a model is served: an engine for `base`, and on it an adapter or nothing."""

    name: str
    """What the engine calls it."""
    base: str
    """Name of the engine's model: a public one, or the id of the job that the engine belongs to."""
    base_path: str
    """Directory or hub id of the engine's weights; of a job's own engine, those that the job started from."""
    adapter: Weights | None = None
    live: str | None = None
    """The job whose policy it is, while that learns from rollouts."""
    version: int = 0
    """Policy version, if it is one."""
    full: FullPolicy | None = None
    """The weights of the job's own engine: a job that trains all weights shares no engine."""
    began: str = ""
    """Name of the model whose weights the engine's began as, where `base` is not that of a base model."""

    @property
    def family(self) -> str:
        """Public name of the base model that all began with: it decides which backend serves the model."""
        return first_base(self.began or self.base)


class _Spec(msgspec.Struct):
    """What is read of a job's specification."""

    model: str
    model_path: str | None
    config: dict[str, Any]
    input: InputKind = "file"
    adapter_path: str | None = None
    trains_adapter: bool | None = None


class _Maker(msgspec.Struct):
    """What is read of a job."""

    id: str
    owner: str
    status: Status
    result: str | None
    spec: _Spec

    @property
    def live(self) -> bool:
        """Whether it learns from what clients send and has not ended."""
        return self.spec.input != "file" and self.status not in TERMINAL

    @property
    def trains_all(self) -> bool:
        """Whether it trains all weights, as far as is known."""
        return trains_all_weights(self.spec.trains_adapter, self.spec.config)


def first_base(name: str) -> str:
    """The base model that a model was trained from, however many jobs ago: fine-tuned ones are `ft:BASE:...`."""
    return name.removeprefix("ft:").partition(":")[0] if name.startswith("ft:") else name


class FineTunedModels:
    """The models that the jobs of one server have trained.

    Args:
        root: The storage directory.
        base: Finds a base model by its name; returns its directory or hub id.
    """

    def __init__(self, store: Store, root: Path, base: Callable[[str], str]) -> None:
        self.store, self.root, self.base = store, root, base

    def locate(self, name: str, stored: str | None = None) -> str:
        """Directory or hub id of weights.

        Args:
            name: The public name of the model.
            stored: Where they are in the storage directory, if a job has made them. A base model that is not here any
                more is called by its name: whoever loads it says so.
        """
        if stored:
            return str(self.root / stored)
        try:
            return self.base(name)
        except ApiError:
            return name

    def find(self, name: str, owner: str) -> ModelRow | None:
        """A model that a job of this owner has trained and that does not change any more; None: there is none."""
        if name.startswith(JOB):
            return self._of_job(name, owner)
        if not name.startswith("ft:"):
            return None
        row = self.store.one("SELECT * FROM models WHERE name=? AND owner=?", name, owner)
        if row is not None:
            return None if row["deleted"] else msgspec.convert(dict(row), ModelRow)
        return self._checkpoint(owner, "c.model=?", name)

    def policy(self, name: str, owner: str) -> Resolved | None:
        """The newest policy of a job that learns from rollouts; None: `name` is not the id of one."""
        job = self._maker(name, owner) if name.startswith(JOB) else None
        return self._policy(job) if job and job.live else None

    def current(self, job_id: str) -> Resolved | None:
        """The newest policy of a job, whoever it belongs to."""
        job = self._maker(job_id)
        return self._policy(job) if job and job.live else None

    def last(self, job_id: str) -> Resolved | None:
        """The newest policy of a job, also after its end, whoever it belongs to."""
        job = self._maker(job_id)
        return self._policy(job) if job and job.spec.input != "file" else None

    def parent(self, model: ModelRow) -> str:
        """What the training of a model began with: a base model, or another fine-tuned one."""
        row = self.store.one("SELECT json_extract(spec, '$.parent') AS parent FROM jobs WHERE id=?", model.job_id)
        return row["parent"] if row and row["parent"] else model.base

    def policies(self, owner: str) -> list[tuple[str, int]]:
        """Ids of the jobs that learn from rollouts now, and when they were created; newest first."""
        rows = self.store.read(
            f"SELECT id, created_at FROM jobs WHERE owner=? AND {NOT_ENDED} AND {LIVE} ORDER BY seq DESC",  # noqa: S608
            owner,
        )
        return [(row["id"], row["created_at"]) for row in rows]

    def _policy(self, job: _Maker) -> Resolved:
        policy, name = newest_policy(self.store, job.id)
        folder, spec = JobDir.of(self.root, job.id).weights / name, job.spec
        path = self.locate(spec.model, spec.model_path)
        if sent := sent_policy(self.store, job.id):
            return self._sent(job, policy.version, name, sent, path)
        if name and not (folder / "adapter_config.json").is_file():
            return self._own(job, str(folder), policy.version)
        if name:
            version, _, attempt = name.partition("-")
            weights = Weights(f"{job.id}-a{attempt}-s{version}", str(folder))
        elif spec.adapter_path:
            weights = Weights(f"{job.id}-a0-s0", str(self.root / spec.adapter_path))
        elif job.trains_all:
            return self._own(job, path, policy.version)
        else:
            return Resolved(spec.model, spec.model, path, live=job.id, version=policy.version)
        return Resolved(weights.name, spec.model, path, weights, job.id, policy.version)

    def _sent(self, job: _Maker, version: int, name: str, sent: dict[str, Any], base: str) -> Resolved:
        """A policy that a sender has sent. While no trainer runs, the checkpoint of its step serves."""
        row = None
        if job.status != "running":
            sql = "SELECT dir FROM checkpoints WHERE job_id=? AND step=?"
            row = self.store.one(sql, job.id, version)
        folder = str(self.root / checkpoint_path(job.id, row["dir"])) if row else None
        if job.trains_all:
            return self._own(job, folder or base, version, None if folder else sent)
        weights = Weights(f"{job.id}-a{name.partition('-')[2]}-s{version}", folder or "", None if folder else sent)
        return Resolved(weights.name, job.spec.model, base, weights, job.id, version)

    def _own(self, job: _Maker, path: str, version: int, sent: dict[str, Any] | None = None) -> Resolved:
        full = FullPolicy(path, version, sent)
        base = self.locate(job.spec.model, job.spec.model_path)
        return Resolved(job.id, job.id, base, live=job.id, version=version, full=full, began=job.spec.model)

    def _of_job(self, name: str, owner: str) -> ModelRow | None:
        """The model of a job that has ended, or a checkpoint that has a name."""
        job_id, colon, checkpoint = name.partition(":")
        job = self._maker(job_id, owner)
        if job is None:
            return None
        if colon:
            where = "c.job_id=? AND c.step=(SELECT step FROM named_checkpoints n WHERE n.job_id=c.job_id AND n.name=?)"
            return self._checkpoint(owner, where, job_id, checkpoint)
        if job.live:
            message = (
                f"Job {job_id} has not ended, and its policy still changes: name a checkpoint of it "
                f"('{job_id}:<name of the checkpoint>')."
            )
            raise ApiError(400, message, "model_in_training", "model")
        if job.result:
            return self.find(job.result, owner)
        newest = "c.job_id=? AND c.step=(SELECT max(step) FROM checkpoints n WHERE n.job_id=c.job_id)"
        if row := self._checkpoint(owner, newest, job_id):
            return row
        if job.spec.input != "file":  # nothing was trained: it is what it started from
            kind: Kind = "adapter" if job.spec.adapter_path else "full"
            path = job.spec.adapter_path or job.spec.model_path or ""
            started_from = job.spec.model if kind == "full" else f"{job_id}-a0-s0"
            return ModelRow(started_from, owner, job_id, job.spec.model, job.spec.model_path or "", path, kind, 0)
        return None

    def _maker(self, job_id: str, owner: str | None = None) -> _Maker | None:
        row = self.store.one("SELECT id, owner, status, fine_tuned_model, spec FROM jobs WHERE id=?", job_id)
        if row is None or owner not in (None, row["owner"]):
            return None
        spec = msgspec.json.decode(row["spec"], type=_Spec)
        return _Maker(row["id"], row["owner"], row["status"], row["fine_tuned_model"], spec)

    def _checkpoint(self, owner: str, where: str, *values: object) -> ModelRow | None:
        """The checkpoint `where` says; it is gone where its directory is."""
        of_job = "checkpoints c JOIN jobs j ON j.id=c.job_id"
        sql = f"SELECT c.job_id, c.dir, c.model, c.created_at, j.spec FROM {of_job} WHERE {where} AND j.owner=?"  # noqa: S608
        row = self.store.one(sql, *values, owner)
        if row is None:
            return None
        path = checkpoint_path(row["job_id"], row["dir"])
        if not (self.root / path).is_dir():
            return None
        spec = msgspec.json.decode(row["spec"], type=_Spec)
        kind: Kind = "adapter" if (self.root / path / "adapter_config.json").is_file() else "full"
        return ModelRow(
            row["model"], owner, row["job_id"], spec.model, spec.model_path or "", path, kind, row["created_at"]
        )
