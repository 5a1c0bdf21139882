"""The events of a run, and their lines in the logs of this version and of earlier ones."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from arbor_core.types import (
    CheckpointDiscarded,
    CheckpointEvent,
    CheckpointWithdrawn,
    ErrorEvent,
    Event,
    EventType,
    GroupsSkipped,
    HyperparametersResolved,
    MessageEvent,
    MetricsEvent,
    PausedEvent,
    PolicyPublished,
    ResultEvent,
    ResumePointWritten,
    StepInputs,
    decode_event,
)
from arbor_core.types.events import KINDS

FED = StepInputs(90, ((0, 17), (45, 18)), (30,))
OLD_FED = {"end": 90, "groups": [[0, 17], [45, 18]], "skipped": [30]}
EVENTS: dict[str, tuple[Event, dict[str, Any]]] = {
    "message": (MessageEvent("m", "warn", 1.5, {"truncated": 2}), {"data": {"truncated": 2}}),
    "message without data": (MessageEvent("m", "warn", 1.5), {}),
    "metrics": (
        MetricsEvent("m", "warn", 1.5, step=3, total_steps=9, values={"train_loss": 0.5, "n": 1}, digest="d", fed=FED),
        {
            "step": 3,
            "data": {"train_loss": 0.5, "n": 1, "step": 3, "total_steps": 9, "digest": "d", "fed": OLD_FED},
        },
    ),
    "metrics that are no numbers": (
        MetricsEvent("m", "warn", 1.5, step=3, total_steps=9, values={"train_loss": None}),
        {"step": 3, "data": {"train_loss": None, "step": 3, "total_steps": 9}},
    ),
    "checkpoint": (
        CheckpointEvent("m", "warn", 1.5, step=3, dir="3-1", metrics={"valid_loss": 0.5}),
        {"step": 3, "data": {"dir": "3-1", "metrics": {"valid_loss": 0.5}}},
    ),
    "named checkpoint": (
        CheckpointEvent("m", "warn", 1.5, step=3, dir="3-1", name="best", metadata={"a": [1]}),
        {"step": 3, "data": {"dir": "3-1", "metrics": {}, "name": "best", "metadata": {"a": [1]}}},
    ),
    "withdrawn": (CheckpointWithdrawn("m", "warn", 1.5, dir="3-1"), {"data": {"dir": "3-1"}}),
    "discarded": (CheckpointDiscarded("m", "warn", 1.5, dir="3-1"), {"data": {"dir": "3-1"}}),
    "published": (
        PolicyPublished("m", "warn", 1.5, version=3, handled=6, dir="3-1"),
        {"type": "weights", "step": 3, "data": {"dir": "3-1", "version": 3, "handled": 6}},
    ),
    "saved": (ResumePointWritten("m", "warn", 1.5, step=3), {"step": 3}),
    "skipped": (GroupsSkipped("m", "warn", 1.5, handled=6), {"type": "weights", "data": {"handled": 6}}),
    "resolved": (
        HyperparametersResolved("m", "warn", 1.5, hyperparameters={"n_epochs": 3}),
        {"data": {"n_epochs": 3}},
    ),
    "result": (
        ResultEvent("m", "warn", 1.5, step=3, dir="3-1", trained_tokens=70, adapter=True),
        {"step": 3, "data": {"dir": "3-1", "step": 3, "trained_tokens": 70, "adapter": True}},
    ),
    "paused": (PausedEvent("m", "warn", 1.5, code=None), {}),
    "paused with a reason": (
        PausedEvent("m", "warn", 1.5, code="insufficient_storage"),
        {"data": {"code": "insufficient_storage", "message": "m"}},
    ),
    "error": (
        ErrorEvent("m", "warn", 1.5, code="worker_error", param="model"),
        {"data": {"code": "worker_error", "message": "m", "param": "model"}},
    ),
}
"""Events, and what their lines held in an earlier version."""
WITHOUT_DATA = (MessageEvent, ResumePointWritten)
"""Kinds of which an earlier line loses nothing: all that the second says was never in `data`."""
PUBLIC = ("message", "metrics", "checkpoint", "withdrawn")


def earlier_line(event: Event, more: dict[str, Any]) -> dict[str, Any]:
    return {"type": event.type, "message": "m", "level": "warn", "at": 1.5, **more}


def test_every_kind_is_known() -> None:
    assert [kind.__struct_config__.tag for kind in KINDS] == list(get_args(EventType))
    assert {type(event) for event, _ in EVENTS.values()} == set(KINDS)


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_read_as_it_was_written(name: str) -> None:
    event, _ = EVENTS[name]
    line = msgspec.json.encode(event)
    assert msgspec.json.decode(line)["type"] == event.type
    assert decode_event(line) == event
    more = {**msgspec.json.decode(line), "of_a_later_version": [1]}
    assert decode_event(msgspec.json.encode(more)) == event, "what is not known is passed over"


@pytest.mark.parametrize("name", EVENTS)
def test_a_line_of_an_earlier_version_is_read(name: str) -> None:
    event, more = EVENTS[name]
    line = earlier_line(event, more)
    assert decode_event(msgspec.json.encode(line)) == event
    if event.type in PUBLIC:
        assert event.data == more.get("data", {}), "clients get what they got before"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_DATA])
def test_no_line_of_an_earlier_version_passes_for_one_of_this(kind: type[Event]) -> None:
    """Each kind requires a key that earlier lines had in `data` or not at all: else what was there would be lost."""
    line = {"type": kind.__struct_config__.tag, "message": "m", "level": "warn", "step": 3, "at": 1.5, "data": {}}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(line, kind)


def test_an_event_of_an_unknown_kind_is_told_of() -> None:
    event = decode_event(b'{"type":"frobnicated","message":"the frob was nicated","of":[1],"at":1.5}')
    assert isinstance(event, MessageEvent)
    assert (event.level, event.at) == ("warn", 1.5)
    assert "'frobnicated'" in event.message
    assert event.message.endswith("the frob was nicated")


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"3",
        b'{"message":"no type"}',
        b'{"type":3}',
        b'{"type":"checkpoint","step":3}',
        b'{"type":"metrics","step":3}',
        b'{"type":"metrics","step":"three","total_steps":4,"values":{}}',
        b'{"type":"weights","data":{}}',
        b'{"type":"error","message":"no code"}',
        b'{"type":"message","message":"m","level":"loud"}',
        b'{"type":"message","data":{"deep":' + b"[" * 5000 + b"]" * 5000 + b"}}",
    ],
)
def test_a_line_that_is_no_event_is_an_error(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_event(line)
