"""The server's settings, typed: `conf/serve.yaml` as structs. Importing it imports no Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .api_keys import ApiKey, Key, Name, entries

Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]
Index = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]
Span = Annotated[str, Meta(pattern=r"^\d{1,6}-\d{1,6}$")]
"""`0-7`: the devices 0 to 7."""


class GpuConfig(msgspec.Struct, forbid_unknown_fields=True):
    train: list[Index | Span] | None
    inference: list[Index | Span] | None

    def __post_init__(self) -> None:
        for key, ids in (("train", self.train_ids), ("inference", self.inference_ids)):
            if ids and len(set(ids)) < len(ids):
                raise ValueError(f"a device is named twice in '{key}': {ids}")

    @property
    def train_ids(self) -> list[int] | None:
        return None if self.train is None else spread(self.train)

    @property
    def inference_ids(self) -> list[int] | None:
        return None if self.inference is None else spread(self.inference)


def spread(devices: Sequence[int | str]) -> list[int]:
    """The number of each device, those of spans too.

    Raises:
        ValueError: a span that ends before it begins.
    """
    ids: list[int] = []
    for entry in devices:
        first, _, last = str(entry).partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ValueError(f"'{entry}' names no device: write it as FIRST-LAST")
        ids += span
    return ids


class ModelsConfig(msgspec.Struct, forbid_unknown_fields=True):
    dirs: list[Path]
    allow: list[str]


class AuthConfig(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key | ApiKey]
    insecure: bool

    def __post_init__(self) -> None:
        self.keys = [*entries(self.keys)]  # hashed from here on


class PluginsConfig(msgspec.Struct, forbid_unknown_fields=True):
    disabled: list[str]


class InferenceConfig(msgspec.Struct, forbid_unknown_fields=True):
    default: str
    models: dict[str, str] = {}
    replicas: dict[str, Count] = {}


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True):
    upload_bytes: Count
    json_bytes: Count
    head_seconds: Seconds
    upload_idle_seconds: Seconds
    upload_bytes_per_second: Annotated[float, Meta(ge=0)]
    upload_seconds: Seconds
    free_bytes: Bytes
    queued_jobs: Annotated[int, Meta(ge=0)]
    requests_per_second: Rate | None
    inference_requests: Count | None
    engine_idle_seconds: Seconds
    engines: Count
    attempts: Count
    heartbeat_seconds: Seconds
    start_seconds: Seconds
    engine_heartbeat_seconds: Seconds
    room_seconds: Seconds
    shutdown_seconds: Seconds


class ServeConfig(msgspec.Struct, forbid_unknown_fields=True):
    """`conf/serve.yaml`, typed. The comment above each key is there."""

    host: str
    port: Annotated[int, Meta(ge=0, le=65535)]
    storage: Path
    models: ModelsConfig
    gpu: GpuConfig
    scheduler: str
    allocator: str
    executor: str
    start: Literal["warm", "cold"]
    launcher: dict[str, Any]
    """`conf/launcher/<name>.yaml`: `name`, and the options of that launcher."""
    inference: InferenceConfig
    organization: Name
    threads: Count | None
    auth: AuthConfig
    plugins: PluginsConfig
    limits: LimitsConfig
    accelerate_config: Path | None
    trainer: dict[str, Any] | None = None
    trainers: dict[str, dict[str, Any]] = {}
    engine: dict[str, Any] = {}
    engines: dict[str, dict[str, Any]] = {}
    default_trainer: str | None = None
    """Whose configuration `trainer` is: `+trainer=NAME`, which is no key."""
