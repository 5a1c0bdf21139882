"""The sampled rollouts of a job, for people to read: what was sampled, how it was scored, and what became of it.

`<job>/samples/` is a segment log (`storage/segment_log.py`) that the trainer's rank 0 writes and nothing is computed
from. A record is a group of the inbox, once it was trained on or skipped, or what a checkpoint answers to the job's
probes; its header holds the group's position in the inbox and the step. Long texts lose their middle, and the oldest
segments are removed: 16 MB are kept, also after the job's end. Nothing is synced: a power failure may cost the last
records, a killed process costs none.

A trainer that goes on from a checkpoint handles groups again. It writes their records once: those whose position is in
the log already, or lies before all that is left of it, are passed over.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from arbor_core.storage.segment_log import (
    DamagedRecordError,
    RecordFormat,
    SegmentLog,
    backwards,
    headers,
    records,
    segments,
)
from arbor_core.types import UNNUMBERED, Record, Rollout, Scored

FORMAT = RecordFormat("QI", checked=True)
"""Position in the inbox, and the step; 0: none."""
SEGMENT_BYTES = 1 << 20
SEGMENTS = 16
TEXT_CHARACTERS = 8_000
"""Most of a prompt, and of a completion, that is kept: half from its begin and half from its end."""
GROUP_CHARACTERS = 200_000
"""Rollouts of a group beyond it are left out; each counts as `ROLLOUT_CHARACTERS` at least."""
ROLLOUT_CHARACTERS = 200
PROBES = 1 << 63
"""Answers to probes have positions from here on, by the step: no inbox is so long."""
NAMES = 100
"""Chat completions of a rollout that are named."""
MARK = " [...] "
"""Stands where the middle of a text was left out."""

Prompt = str | list[dict[str, Any]]
"""Text, or messages."""
Answer = str | dict[str, Any]
"""Text, or a message."""
T = TypeVar("T")
Decode = Callable[[list[int]], str]
"""Token ids as text."""


class SampledRollout(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One rollout of a group."""

    prompt: int
    """Which of the group's prompts."""
    completion: Answer
    cut: bool = False
    """The prompt or the completion is not whole."""
    trajectory: int = 0
    reward: float | None = None
    advantage: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    truncated: bool = False
    """It ended because it was long enough."""
    completions: tuple[str, ...] = ()
    """Ids of the chat completions it was made of, up to `NAMES`."""


class SampledGroup(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One record."""

    position: int
    """Where the group stands in the inbox."""
    step: int = 0
    """The optimizer step that it was trained in, the first of several; 0: none."""
    error: str | None = None
    """Why it was not trained on."""
    version: int
    """Oldest policy version that sampled any of it."""
    id: int
    """Batch id; -1: none."""
    label: str | None = None
    """The client's name for it."""
    size: int
    """Rollouts of the group. There may be fewer in `rollouts`."""
    prompts: tuple[Prompt, ...]
    rollouts: tuple[SampledRollout, ...]
    at: float
    """Seconds since the epoch."""


def sampled(
    record: Record,
    step: int | None = None,
    scored: Sequence[Scored] = (),
    decode: Decode | None = None,
    error: str | None = None,
) -> SampledGroup:
    """What is kept of a group. See `arbor_core.types.Run.report_samples`."""
    group = record.group
    numbers: dict[bytes, int] = {}
    prompts: list[tuple[Prompt, bool]] = []
    rollouts: list[SampledRollout] = []
    room = GROUP_CHARACTERS
    for rollout, score in zip(group.rollouts, [*scored, *[Scored()] * len(group.rollouts)], strict=False):
        key = rollout.prompt if rollout.messages is None else msgspec.json.encode(rollout.messages)
        if key not in numbers:
            numbers[key] = len(prompts)
            prompts.append(prompt_of(rollout, decode))
            room -= TEXT_CHARACTERS if prompts[-1][1] else len(key)
        prompt, (completion, cut) = numbers[key], completion_of(rollout, decode)
        rollouts.append(sampled_rollout(rollout, score, prompt, completion, cut=cut or prompts[prompt][1]))
        room -= ROLLOUT_CHARACTERS + (len(completion) if isinstance(completion, str) else TEXT_CHARACTERS)
        if room <= 0:
            break
    return SampledGroup(
        position=record.start,
        step=step or 0,
        error=error,
        version=group.version,
        id=group.id,
        label=group.label,
        size=len(group.rollouts),
        prompts=tuple(prompt for prompt, _ in prompts),
        rollouts=tuple(rollouts),
        at=time.time(),
    )


def probed(name: str, step: int, answers: Sequence[tuple[str, str]]) -> SampledGroup:
    """What is kept of the answers that a checkpoint gives to the job's probes, each a prompt and its completion."""
    rollouts = []
    for number, (_, completion) in enumerate(answers):
        text, cut = shortened(completion)
        rollouts.append(SampledRollout(prompt=number, trajectory=number, completion=text, cut=cut))
    return SampledGroup(
        position=PROBES + step,
        step=step,
        version=step,
        id=UNNUMBERED,
        label=f"probe:{name}",
        size=len(rollouts),
        prompts=tuple(shortened(prompt)[0] for prompt, _ in answers),
        rollouts=tuple(rollouts),
        at=time.time(),
    )


def sampled_rollout(rollout: Rollout, score: Scored, prompt: int, completion: Answer, *, cut: bool) -> SampledRollout:
    """What is kept of a rollout. Tokens are counted here where they are known, and told by the trainer where not."""
    tokens = rollout.messages is None and rollout.answer is None
    return SampledRollout(
        prompt=prompt,
        completion=completion,
        cut=cut,
        trajectory=rollout.trajectory,
        reward=rollout.reward,
        advantage=rollout.advantage if score.advantage is None else score.advantage,
        prompt_tokens=len(rollout.prompt) // 4 if tokens else score.prompt_tokens,
        completion_tokens=len(rollout.completion) // 4 if tokens else score.completion_tokens,
        truncated=rollout.truncated,
        completions=rollout.completions[:NAMES],
    )


def prompt_of(rollout: Rollout, decode: Decode | None) -> tuple[Prompt, bool]:
    """A rollout's prompt, and whether it lost its middle. Messages that are too long are shown as their JSON."""
    if rollout.messages is None:
        return decoded(rollout.prompt, decode)
    return whole_or_cut(rollout.messages)


def completion_of(rollout: Rollout, decode: Decode | None) -> tuple[Answer, bool]:
    """A rollout's completion, and whether it lost its middle. A message that says nothing but text is shown as that."""
    answer = rollout.answer
    if answer is None:
        return decoded(rollout.completion, decode)
    if answer.keys() <= {"role", "content"} and isinstance(answer.get("content"), str):
        return shortened(answer["content"])
    return whole_or_cut(answer)


def whole_or_cut(value: T) -> tuple[T | str, bool]:
    written = msgspec.json.encode(value).decode()
    return (value, False) if len(written) <= TEXT_CHARACTERS else shortened(written)


def shortened(text: str) -> tuple[str, bool]:
    """A text without its middle if it is too long, and whether it is."""
    if len(text) <= TEXT_CHARACTERS:
        return text, False
    half = TEXT_CHARACTERS // 2
    return text[:half] + MARK + text[-half:], True


def decoded(raw: bytes, decode: Decode | None) -> tuple[str, bool]:
    """Tokens as text, and whether it lost its middle. What cannot be decoded is shown as numbers."""
    ids = array("i")
    ids.frombytes(raw[: len(raw) // 4 * 4])  # a group that is rejected may have anything
    half = TEXT_CHARACTERS // 2
    cut = len(ids) > TEXT_CHARACTERS
    parts = [list(part) for part in ((ids[:half], ids[-half:]) if cut else (ids,))]
    try:
        texts = [decode(part) if decode and part else spelled(part) for part in parts]
    except Exception:  # ids that no tokenizer knows, of a group that is rejected for them
        texts = [spelled(part) for part in parts]
    text, cut_again = shortened(MARK.join(texts))
    return text, cut or cut_again


def spelled(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


class SampleLog:
    """The writing end. One process writes."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES, max_segments: int = SEGMENTS) -> None:
        """Open for appending; a torn tail is cut off.

        Raises:
            OSError: the folder cannot be written.
        """
        self.segment_bytes, self.max_segments = segment_bytes, max_segments
        there, end = segments(folder), 0
        positions = [{header.extra[0] for header in headers(path, FORMAT)} for _, path in there[:-1]]
        last: set[int] = set()
        with contextlib.suppress(DamagedRecordError):
            for header, _ in records(there[-1][1], FORMAT) if there else ():
                last.add(header.extra[0])
                end = header.end
        positions.append(last)
        self.before = frozenset().union(*positions)
        """Positions of the groups that an earlier attempt has written down."""
        groups = {position for position in positions[0] if position < PROBES}
        self.forgotten = max(groups, default=0) if there and there[0][0] > 0 else 0
        """Groups before this position were written down too: those that are not in the log any more were removed. They
        are written nearly in the order of their positions, far nearer than a segment is long."""
        self.log = SegmentLog("samples", folder)
        self.log.cut_tail(end)

    def add(self, group: SampledGroup) -> None:
        """Write a group down, unless an earlier attempt has.

        Raises:
            OSError: the disk is full, for example; nothing of it is left.
        """
        if group.position < self.forgotten or group.position in self.before:
            return
        if self.log.size >= self.segment_bytes:
            self.log.rotate(self.log.number + 1)
            for number, path in segments(self.log.folder):
                if number <= self.log.number - self.max_segments:
                    path.unlink(missing_ok=True)
        payload = msgspec.msgpack.encode(group)
        self.log.append([FORMAT.header(payload, group.position, group.step) + payload])

    def close(self) -> None:
        self.log.close()


class Place(NamedTuple):
    """Where a sampled rollout stands in the log."""

    segment: int
    offset: int
    """Of its group's record."""
    rollout: int
    """Its number in the group."""


def newest_first(
    folder: Path, after: Place | None = None, step: int | None = None
) -> Iterator[tuple[Place, SampledGroup]]:
    """The rollouts of a log, each with its group: the newest group first, its rollouts in their order. What is damaged
    is passed over. A segment is read when its turn comes, and of it only the records that are wanted.

    Args:
        after: Begin behind this one.
        step: Only what was trained in this step.
    """
    for number, path in reversed(segments(folder)):
        if after and number > after.segment:
            continue
        last = after.offset if after and number == after.segment else None
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            for header, payload in backwards(path, FORMAT, last):
                if step is not None and header.extra[1] != step:
                    continue
                group = msgspec.msgpack.decode(payload, type=SampledGroup)
                first = after.rollout + 1 if after and (number, header.start) == after[:2] else 0
                for index in range(first, len(group.rollouts)):
                    yield Place(number, header.start, index), group


def find(folder: Path, place: Place) -> Place | None:
    """`place` if a rollout stands there, or stood there until it was removed with all that is older; else None."""
    there = segments(folder)
    if there and place.segment < there[0][0]:
        return place
    path = dict(there).get(place.segment)
    if path is None:
        return None
    try:
        found = next(backwards(path, FORMAT, place.offset), None)
    except FileNotFoundError:
        return place
    if found is None or found[0].start != place.offset:
        return None
    return place if place.rollout < len(msgspec.msgpack.decode(found[1], type=SampledGroup).rollouts) else None
