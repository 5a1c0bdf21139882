"""What YAML and requests configure: three trainers, the engine and the launcher."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from arbor_core import RolloutConfig

NODE = "mock-node"
"""The machine of the allocator and the executor `mock_node`."""

Seconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]


FORMER_VALUES: Mapping[str, Any] = {"resume_seconds": None}
"""Keys that jobs of earlier versions have not."""

Fault = Literal["none", "fail", "crash", "hang", "lose_gpu", "out_of_memory", "bad_checkpoint"]


class MockConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`conf/trainer/mock.yaml`, typed; each key is explained there."""

    n_epochs: Annotated[int, Meta(ge=1, le=50)] | Literal["auto"]
    batch_size: Annotated[int, Meta(ge=1, le=256)] | Literal["auto"]
    learning_rate_multiplier: Annotated[float, Meta(gt=0)] | Literal["auto"]
    learning_rate: Annotated[float, Meta(gt=0)]
    steps: Count | None
    step_seconds: Seconds
    checkpoint_steps: Count | None
    resume_seconds: Seconds | None
    fault: Fault
    fault_step: Count
    fault_times: Count

    former_values: ClassVar[Mapping[str, Any]] = FORMER_VALUES


class MockGrpoConfig(RolloutConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`conf/trainer/mock_grpo.yaml`, typed; each key is explained there."""

    max_steps: Count | None
    learning_rate: Annotated[float, Meta(gt=0)]
    step_seconds: Seconds
    checkpoint_steps: Count | None
    resume_seconds: Seconds | None
    fault: Fault
    fault_step: Annotated[int, Meta(ge=0)]
    fault_times: Count

    former_values: ClassVar[Mapping[str, Any]] = FORMER_VALUES


class EngineOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`conf/backend/mock.yaml`, typed; each key is explained there."""

    devices: Count
    share: Annotated[float, Meta(gt=0, le=1)]
    adapters: Count
    replicas: Count
    context: Count
    max_running: Count
    max_waiting: Annotated[int, Meta(ge=0)]
    load_seconds: Seconds
    weights_seconds: Seconds
    delay_seconds: Seconds
    token_seconds: Seconds
    load_error: str | None
    die_after_tokens: Annotated[int, Meta(ge=0)] | None


class LauncherOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """`conf/launcher/mock.yaml`, typed; each key is explained there."""

    nice: Annotated[int, Meta(ge=0, le=19)]


class MockCommand(Struct, frozen=True, forbid_unknown_fields=True):
    """A command of the trainer `mock_commands`, as it stands in the inbox."""

    do: Literal["add", "sum", "checkpoint", "publish"]
    n: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] = 0
    """What to add."""


class MockCommandsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`conf/trainer/mock_commands.yaml`, typed; each key is explained there."""

    step_seconds: Seconds
    checkpoint_commands: Count | None
    resume_seconds: Seconds | None
    fault: Fault
    fault_step: Annotated[int, Meta(ge=0)]
    fault_times: Count

    former_values: ClassVar[Mapping[str, Any]] = FORMER_VALUES
