"""Query strings and answers that are Arbor's own, not OpenAI's."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_PAGE = 1000
"""Most objects on a page, where OpenAI does not say another number."""


class Page(Struct):
    """Query of the fine-tuning lists."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 20


class EventPage(Page):
    """Query of a job's events; `superseded`: with the metrics of steps that a later attempt has made again."""

    superseded: bool = False


class CheckpointPage(Struct):
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 10


class SamplePage(Struct):
    """Query of a job's samples, each of which may be 16,000 characters long."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    step: Annotated[int, Meta(ge=1)] | None = None
    min_reward: float | None = None
    max_reward: float | None = None


class LeasePage(Struct):
    """Query of the history of leases; `device` is a device's id."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 20
    device: str | None = None


class FilePage(Struct):
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class Health(Struct):
    status: str
