"""Which models there are: base models in the operator's folders or on the hub, and what jobs have made of them (see
`made`)."""

from __future__ import annotations

import re
import sqlite3
import time
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import msgspec

from arbor_core.config.settings import ModelsConfig
from arbor_core.jobs.states import NOT_ENDED
from arbor_core.storage.database import Store
from arbor_core.types import ApiError, Weights

from .fine_tuned import JOB, WITH_PARENT, FineTunedModels, Kind, Resolved, first_base

PREFIXES = ("openai/", "arbor:", "local:", "huggingface/")
"""What other clients put before a model's name; it means nothing here."""
_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_BASE = re.compile(rf"{_PART}(?:/{_PART})?")
_HUB = re.compile(rf"{_PART}/{_PART}")

CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Files of a model that may name code (`auto_map`)."""


class Start(msgspec.Struct, frozen=True):
    """Where a job starts from."""

    name: str
    """Public name of the model whose weights they are."""
    path: str | None
    """Where those weights are in the storage directory; None: it is a base model."""
    adapter: str | None = None
    """Where the adapter on it is in the storage directory that is trained further."""
    parent: str | None = None
    """Public name of the fine-tuned model that is trained further; None: a base model is."""
    maker: str | None = None
    """The job that has trained it."""


class Listed(msgspec.Struct, frozen=True):
    """A model as `GET /v1/models` shows it."""

    name: str
    created_at: int
    fine_tuned: bool
    parent: str | None = None
    """What its training began with: a base model, or another fine-tuned one."""


class Models:
    """The models that one server knows.

    Args:
        root: The storage directory.
    """

    def __init__(self, store: Store, config: ModelsConfig, root: Path) -> None:
        self.store, self.config, self.root = store, config, root
        self.jobs = FineTunedModels(store, root, self.base)
        self.locate = self.jobs.locate

    def base(self, name: str) -> str:
        """Directory or hub id of a base model's weights.

        Raises:
            ApiError: 400 if `name` cannot be one or its weights bring code, 404 if there is none.
        """
        if name.startswith(("ft:", JOB)):
            raise unknown(name)
        if not _BASE.fullmatch(name) or ".." in name:
            message = (
                f"Invalid model '{name[:80]}': expected the name of a model on this server (GET /v1/models), "
                "a hub id (organization/name), or a fine-tuned model."
            )
            raise ApiError(400, message, "invalid_model", "model")
        for folder in self.config.dirs:
            if is_model(folder / name):
                refuse_code(name, folder / name)
                return str((folder / name).absolute())
        if _HUB.fullmatch(name) and any(fnmatchcase(name, pattern) for pattern in self.config.allow):
            return name
        raise unknown(name)

    def resolve(self, name: str, owner: str) -> Resolved:
        """How to serve a model, fine-tuned or not, or the policy of a job that learns from rollouts.

        Raises:
            ApiError: there is no such model.
        """
        if policy := self.jobs.policy(name, owner):
            return policy
        if (made := self.jobs.find(name, owner)) is None:
            return Resolved(name, name, self.base(name))
        if made.kind == "full":
            return Resolved(made.name, made.name, self.locate(made.name, made.path), began=made.base)
        base = self.locate(made.base, made.base_path)
        return Resolved(made.name, made.base, base, Weights(made.name, str(self.root / made.path)))

    def trainable(self, name: str, owner: str, *, adapters: bool = False) -> Start:
        """Weights that a job may start from.

        Args:
            adapters: Whether the trainer can go on with an adapter.

        Raises:
            ApiError: there is no such model, or it is an adapter and the trainer cannot go on with one.
        """
        if (made := self.jobs.find(name, owner)) is None:
            self.base(name)
            return Start(name, None)
        if made.kind == "full":
            return Start(made.name, made.path or None, None, made.name, made.job_id)
        if not adapters:
            message = (
                f"Model '{name}' is an adapter, and this method cannot train one further: use its base, '{made.base}'."
            )
            raise ApiError(400, message, "unsupported_model", "model")
        return Start(made.base, made.base_path or None, made.path, made.name, made.job_id)

    def list(self, owner: str) -> list[Listed]:
        """Base models by name, then this owner's policies in training and fine-tuned models, newest first."""
        bases = {hub: 0 for hub in self.config.allow if _HUB.fullmatch(hub)}
        for folder in reversed(self.config.dirs):
            found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if is_model(path)]
            bases |= {str(path.relative_to(folder)): int(path.stat().st_mtime) for path in found}
        rows = self.store.read(f"{WITH_PARENT} WHERE m.owner=? AND m.deleted=0 ORDER BY m.seq DESC", owner)
        return [
            *(Listed(name, created, False) for name, created in sorted(bases.items()) if _BASE.fullmatch(name)),
            *(Listed(job_id, created, True) for job_id, created in self.jobs.policies(owner)),
            *(Listed(row["name"], row["created_at"], True, row["parent"]) for row in rows),
        ]

    def get(self, name: str, owner: str) -> Listed:
        """One model, whatever may be asked for in a completion.

        Raises:
            ApiError: there is no such model.
        """
        if created := dict(self.jobs.policies(owner)).get(name):
            return Listed(name, created, True)
        if made := self.jobs.find(name, owner):
            return Listed(name, made.created_at, True, self.jobs.parent(made))
        path = Path(self.base(name))
        return Listed(name, int(path.stat().st_mtime) if path.is_absolute() else 0, False)

    async def delete(self, name: str, owner: str) -> None:
        """Forget a fine-tuned model; its job and checkpoints stay.

        Raises:
            ApiError: there is no such model, it is not one that a job has made, or a job is training on it.
        """

        def mark(db: sqlite3.Connection) -> str | None:
            row = db.execute("SELECT path FROM models WHERE name=? AND owner=? AND deleted=0", (name, owner)).fetchone()
            if row is None:
                return "not a model of its own"
            user = db.execute(
                f"SELECT id FROM jobs WHERE {NOT_ENDED}"  # noqa: S608
                " AND ? IN (json_extract(spec, '$.model_path'), json_extract(spec, '$.adapter_path'))",
                (row["path"],),
            ).fetchone()
            if user:
                message = f"Model '{name}' is being trained further by job {user[0]}: cancel it, or wait for its end."
                raise ApiError(400, message, "model_in_use", "model")
            db.execute("UPDATE models SET deleted=1 WHERE name=?", (name,))
            return None

        if await self.store.write(mark):
            self.get(name, owner)  # 404 if there is nothing of that name
            message = f"Model '{name}' cannot be deleted: only the result of a fine-tuning job can."
            raise ApiError(403, message, "model_not_deletable", "model")


def add_model(
    db: sqlite3.Connection, *, name: str, owner: str, job_id: str, base: str, base_path: str, path: str, kind: Kind
) -> None:
    """Note a job's result; part of the caller's transaction. A second time changes nothing."""
    db.execute(
        "INSERT OR IGNORE INTO models(name,owner,job_id,base,base_path,path,kind,created_at) VALUES(?,?,?,?,?,?,?,?)",
        (name, owner, job_id, base, base_path, path, kind, int(time.time())),
    )


def ft_name(base: str, organization: str, suffix: str | None, job_id: str) -> str:
    """Name of a job's model: `ft:BASE:ORGANIZATION:SUFFIX:` and the last 8 characters of the job's id.

    The base of a model that was trained further is the one that all began with.
    """
    return f"ft:{first_base(base)}:{organization}:{suffix or ''}:{job_id[-8:]}"


def strip_provider(name: str) -> str:
    """A model's name without the prefix by which other clients choose a provider."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def unknown(name: str) -> ApiError:
    return ApiError(404, f"The model '{name[:200]}' does not exist", "model_not_found", "model")


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model's configuration and its weights in the one format that is loaded."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def refuse_code(name: str, folder: Path) -> None:
    """Weights that need code of their own are not served and not trained: that code would run here.

    Raises:
        ApiError: one of its configurations names such code, or cannot be read.
    """
    for path in (folder / config for config in CONFIGS):
        if path.is_file() and (reason := _why_refused(path, path.stat().st_mtime_ns)):
            raise ApiError(400, f"Model '{name}' cannot be used: its {path.name} {reason}", "invalid_model", "model")


@lru_cache(256)
def _why_refused(config: Path, changed: int) -> str | None:
    """`changed` is the file's time of change: another one is another question."""
    try:
        values = msgspec.json.decode(config.read_bytes())
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"cannot be read ({error})."
    if isinstance(values, dict) and "auto_map" in values:
        return (
            "names code of its own (auto_map), which is never run. "
            "If the installed transformers knows this architecture, remove that key."
        )
    return None
