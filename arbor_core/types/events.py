"""What a run reports: one struct for each kind of event, one JSON object for each line of `events.jsonl`.

The key `type` of a line names its kind. `decode_event` reads lines of earlier versions too: a job may have been started
by one, and the logs of old attempts are read again.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, Literal, TypeVar, cast, get_args

import msgspec
from msgspec import Struct, field

from .rollouts import StepInputs

Level = Literal["info", "warn", "error"]
EventType = Literal[
    "message",
    "metrics",
    "checkpoint",
    "withdrawn",
    "discarded",
    "saved",
    "published",
    "skipped",
    "resolved",
    "result",
    "paused",
    "error",
]


class Event(Struct, tag_field="type", omit_defaults=True):
    """What all kinds of events have."""

    message: str = ""
    """For people."""
    level: Level = "info"
    at: float = 0.0
    """Seconds since the epoch; set when the event is written."""

    @property
    def type(self) -> EventType:
        """The name of its kind."""
        return cast("EventType", self.__struct_config__.tag)

    @property
    def data(self) -> dict[str, Any]:
        """What clients get of it beside the message, as plain values."""
        return {}


EventT = TypeVar("EventT", bound=Event)


class MessageEvent(Event, tag="message"):
    """A line for whoever follows the job."""

    data: dict[str, Any] = field(default_factory=dict)


class MetricsEvent(Event, tag="metrics", kw_only=True):
    """The numbers of one optimizer step."""

    step: int
    total_steps: int
    values: dict[str, Any]
    """By name (`train_loss`, ...); None where it was no finite number."""
    digest: str | None = None
    """Stands for the trained parameters after the step."""
    fed: StepInputs | None = None
    """Which groups of the inbox formed the step."""

    @property
    def data(self) -> dict[str, Any]:
        found = {**self.values, "step": self.step, "total_steps": self.total_steps}
        if self.digest:
            found["digest"] = self.digest
        if self.fed:
            found["fed"] = msgspec.json.decode(msgspec.json.encode(self.fed))
        return found


class CheckpointEvent(Event, tag="checkpoint", kw_only=True):
    """A checkpoint is there, or has got a name."""

    step: int
    dir: str
    """Name of its directory under `checkpoints`."""
    metrics: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    """What a client called it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the client keeps with the name."""

    @property
    def data(self) -> dict[str, Any]:
        named = {"name": self.name, "metadata": self.metadata} if self.name else {}
        return {"dir": self.dir, "metrics": self.metrics, **named}


class CheckpointWithdrawn(Event, tag="withdrawn", kw_only=True):
    """A checkpoint is damaged, and is not offered any more."""

    dir: str

    @property
    def data(self) -> dict[str, Any]:
        return {"dir": self.dir}


class CheckpointDiscarded(Event, tag="discarded", kw_only=True):
    """A checkpoint was removed to make room for newer ones."""

    dir: str


class ResumePointWritten(Event, tag="saved", kw_only=True):
    """Training can go on after this step should it be interrupted."""

    step: int


class PolicyPublished(Event, tag="published", kw_only=True):
    """A new version of the policy is there, from which completions are sampled from now on."""

    version: int
    """Optimizer steps that it has seen."""
    handled: int
    """How many groups of the inbox were trained on or skipped so far."""
    dir: str
    """Its name: `<version>-<attempt>`, and that of its directory under `weights`."""
    sent: dict[str, Any] | None = None
    """What a sender returned that has sent it; None: it is a directory."""


class GroupsSkipped(Event, tag="skipped", kw_only=True):
    """Groups were skipped and no step follows yet."""

    handled: int
    """How many groups of the inbox were trained on or skipped so far."""


class HyperparametersResolved(Event, tag="resolved", kw_only=True):
    """The numbers that stand for `"auto"`."""

    hyperparameters: dict[str, Any]


class ResultEvent(Event, tag="result", kw_only=True):
    """The job has succeeded; its model is a checkpoint."""

    step: int
    dir: str
    """Name of the checkpoint's directory."""
    trained_tokens: int
    adapter: bool = False
    """The checkpoint is a PEFT adapter, else a whole model."""
    more: dict[str, Any] = field(default_factory=dict)
    """What else the trainer told of it."""


class PausedEvent(Event, tag="paused", kw_only=True):
    """The attempt has ended, and the job can be taken up again from its last checkpoint."""

    code: str | None
    """Why, if nobody had asked for it: `insufficient_storage`."""


class ErrorEvent(Event, tag="error", kw_only=True):
    """The attempt cannot go on; `message` is for the user."""

    code: str
    param: str | None = None


KINDS: tuple[type[Event], ...] = (
    MessageEvent,
    MetricsEvent,
    CheckpointEvent,
    CheckpointWithdrawn,
    CheckpointDiscarded,
    ResumePointWritten,
    PolicyPublished,
    GroupsSkipped,
    HyperparametersResolved,
    ResultEvent,
    PausedEvent,
    ErrorEvent,
)
ANY: Any = reduce(or_, KINDS)
"""The union of all kinds."""
DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(ANY)


class EarlierEvent(Struct):
    """A line of a version whose events were all alike, but for what was in `data`."""

    type: str
    message: str = ""
    level: Level = "info"
    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0


EARLIER = msgspec.json.Decoder(EarlierEvent)


def decode_event(line: bytes) -> Event:
    """The event of a line. Keys that are not known are passed over. One of a kind that is not known, because a newer
    version wrote it, becomes a warning that says so: the job goes on, and whoever follows it hears of that.

    Raises:
        msgspec.DecodeError: it is no event.
    """
    try:
        return DECODER.decode(line)
    except msgspec.ValidationError:  # all kinds but messages require a key that an earlier line has in `data`, or not
        return from_earlier(EARLIER.decode(line))
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None


def from_earlier(line: EarlierEvent) -> Event:
    """The event of a line that an earlier version wrote, or a newer one.

    Raises:
        msgspec.ValidationError: its `data` is not what belongs to its type.
    """
    kind, data = line.type, line.data
    if kind == "weights":
        kind = "published" if "dir" in data else "skipped"
    elif kind == "metrics":
        own: dict[str, Any] = {name: data[name] for name in ("total_steps", "digest", "fed") if name in data}
        data = {**own, "values": {name: value for name, value in data.items() if name not in {*own, "step"}}}
    elif kind == "resolved":
        data = {"hyperparameters": data}
    elif kind == "paused":
        data = {"code": data.get("code")}
    elif kind not in get_args(EventType):
        text = f"The trainer reported an event of the type '{kind}', which this version of Arbor does not know"
        return MessageEvent(f"{text}: {line.message}" if line.message else text, "warn", line.at)
    common = {"type": kind, "message": line.message, "level": line.level, "at": line.at, "step": line.step}
    return cast("Event", msgspec.convert({**data, **common}, ANY))
