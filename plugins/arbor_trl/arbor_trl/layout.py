"""Where turns are in a text that a chat template made, without rendering each of them by itself: see `turns`."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arbor_core import Conversation, Found, left_out

Span = tuple[int, int]

TAGS = re.compile(r"</?[\w:|]+>|\[/?[A-Z_]+\]")


def kinds_of(
    turns: Sequence[int], messages: Sequence[dict[str, Any]], tags: frozenset[str]
) -> Iterator[tuple[int, Any]]:
    """Turns with what templates look at: what the messages around are made of, and which roles follow."""
    last = len(messages) - 1
    kinds = [_kind(message, tags) for message in messages]
    later: list[frozenset[str]] = [frozenset()] * (last + 2)
    for index in range(last, 0, -1):
        role = messages[index]["role"]
        later[index] = later[index + 1] if role in later[index + 1] else later[index + 1] | {role}
    for index in turns:
        around = tuple(kinds[max(0, index - 2) : index + 2])
        yield index, (around, min(index, 3), later[index + 1], min(last - index, 3))


def _kind(message: dict[str, Any], tags: frozenset[str]) -> Any:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    calls = min(2, len(message.get("tool_calls") or ()))
    return message["role"], tuple(sorted(message)), bool(text), calls, tags.intersection(TAGS.findall(text))


@dataclass(frozen=True)
class Rule:
    """Where turns of a kind are."""

    opening: str
    """Between the message before and the turn."""
    stop: str
    """The token that ends it."""
    lost: frozenset[str]
    """Fields that the template leaves out."""


class Layout:
    """Where messages are in a text, by their marks, and the tokens that may end turns."""

    def __init__(self, found: Found, conversation: Conversation, stops: re.Pattern[str] | None) -> None:
        self.found, self.conversation, text = found, conversation, found.text
        self.text, self.first, self.last = text, dict[int, int](), dict[int, int]()
        for at, number in zip(found.at, found.numbers, strict=True):
            field = conversation.marks.fields[number]
            self.first.setdefault(field.message, at)
            self.last[field.message] = at + len(field.rest) if text.startswith(field.rest, at) else at
        ends = [match.span() for match in stops.finditer(text)] if stops else []
        self.starts, self.ends = [start for start, _ in ends], [end for _, end in ends]

    def rule(self, sure: Mapping[int, Span]) -> Rule | None:
        """What places some turns where they are known to be; None: no one rule does."""
        index, (begin, end) = next(iter(sure.items()))
        before, at = self._before(index), bisect_left(self.ends, end)
        if before is None or before > begin or at == len(self.ends) or self.ends[at] != end:
            return None
        rule = Rule(self.text[before:begin], self.text[self.starts[at] : end], self._lost(index, (begin, end)))
        return rule if all(self.span(index, rule) == span for index, span in sure.items()) else None

    def span(self, index: int, rule: Rule) -> Span | None:
        """A turn by a rule; None: what is there is something else, or lacks what others have."""
        before, after = self._before(index), self.last.get(index)
        if before is None or after is None or not self.text.startswith(rule.opening, before):
            return None
        at = bisect_left(self.starts, after)
        if at == len(self.starts) or self.text[self.starts[at] : self.ends[at]] != rule.stop:
            return None
        span = before + len(rule.opening), self.ends[at]
        complete = span[0] <= self.first[index] and self._lost(index, span) == rule.lost
        return span if complete else None

    def _lost(self, index: int, span: Span) -> frozenset[str]:
        return frozenset(field.path for field in left_out(self.conversation, index, self.found, *span))

    def _before(self, index: int) -> int | None:
        """Where the message before ends that has left a mark; None: messages are in another order, or there is none."""
        earlier = next((self.last[at] for at in range(index - 1, -1, -1) if at in self.last), None)
        return earlier if earlier is not None and earlier <= self.first.get(index, earlier) else None
