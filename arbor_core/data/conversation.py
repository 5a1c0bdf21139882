"""A conversation while a chat template runs over it: control tokens in messages are disguised, and what was said is
found again in what the template makes of it.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import msgspec

from arbor_core.storage.codec import check_depth

from .marks import Field, Found, Marks, unsaid
from .message_form import THOUGHTS, Message

Span = tuple[int, int]


class ChatText(msgspec.Struct, frozen=True):
    """A rendered conversation.

    `controls` is None where every control token in the text is the template's, so that it can be tokenised as it is.
    Otherwise a message contains some too: these are the template's, and what lies between them is to be tokenised with
    control tokens as text (`split_special_tokens`).
    """

    text: str
    controls: tuple[Span, ...] | None = None


class LeftOutError(ValueError):
    """A template leaves out what the assistant said, or changes it."""

    def __init__(self, field: str, *, changed: bool = False) -> None:
        super().__init__(f"the model's chat template {'changes' if changed else 'leaves out'} {field}")
        self.field, self.changed = field, changed


class Conversation:
    """Messages and tools in which control tokens are disguised while the template runs (row 138): replaced by words
    that nobody can guess, so that whatever control tokens the template puts out are its own.

    Args:
        control: Matches the control tokens.
        given: The messages as they came, for errors.
        tags: Matches the tags that the template may rewrite.

    Raises:
        ValueError: a message or tool is nested too deeply.
    """

    def __init__(
        self,
        control: re.Pattern[str] | None,
        messages: list[Message],
        tools: list[Any] | None,
        given: Sequence[Mapping[str, Any]],
        tags: re.Pattern[str] | None = None,
    ) -> None:
        self.control, self.secret, self.given, self.tags = control, secrets.token_hex(12), given, tags
        self.found: list[str] = []
        for name, values in (("messages", messages), ("tools", tools or ())):
            for index, value in enumerate(values):
                check_depth(value, f"{name}[{index}]")
        self.messages: list[Message] = self._disguise(messages)
        self.tools: list[Any] | None = self._disguise(tools)

    @cached_property
    def marks(self) -> Marks:
        """The messages once more, with marks."""
        return Marks(self.messages, self.tags)

    @cached_property
    def word(self) -> re.Pattern[str]:
        """Matches the words that stand for control tokens."""
        return re.compile(f"x{self.secret}n([0-9]+)x")

    def field(self, index: int, path: str) -> str:
        """What clients call a field of a message."""
        given = self.given[index]
        call = re.match(r"tool_calls\[(\d+)\]\.function(.*)", path)
        if call and int(call[1]) >= len(given.get("tool_calls") or ()):
            path = "function_call" + call[2]
        elif path == "content" and not given.get("content") and given.get("refusal"):
            path = "refusal"
        elif path in THOUGHTS:  # whatever the template calls it
            path = next((key for key in THOUGHTS if given.get(key)), path)
        return f"messages[{index}].{path}"

    def without_thought(self, index: int) -> Conversation:
        """The same conversation, but for the thought of one message."""
        other = copy(self)
        vars(other).pop("marks", None)
        message = {key: value for key, value in self.messages[index].items() if key not in THOUGHTS}
        other.messages = [*self.messages[:index], message, *self.messages[index + 1 :]]
        return other

    def reveal(self, rendered: str) -> ChatText:
        """The rendered text with the control tokens of the messages as they were written."""
        return self.reveal_with(rendered, ())[0]

    def reveal_with(self, rendered: str, positions: Sequence[int]) -> tuple[ChatText, list[int]]:
        """The same, and where positions in the rendered text are in it."""
        if self.control is None or self.secret not in rendered:
            return ChatText(rendered), list(positions)
        parts, ends, shifts = [], [0], [0]
        at = 0
        for word in self.word.finditer(rendered):
            written = self.found[int(word[1])]
            parts += [rendered[at : word.start()], written]
            at = word.end()
            ends.append(at)
            shifts.append(shifts[-1] + len(written) - len(word[0]))

        def moved(position: int) -> int:
            return position + shifts[bisect_right(ends, position) - 1]

        controls = tuple((moved(each.start()), moved(each.end())) for each in self.control.finditer(rendered))
        return ChatText("".join(parts) + rendered[at:], controls), [moved(each) for each in positions]

    def _disguise(self, value: Any) -> Any:
        """The same value with the control tokens of every string in it disguised."""
        if isinstance(value, str):
            return self.control.sub(self._word, value) if self.control else value
        if isinstance(value, Mapping):
            return {self._disguise(key): self._disguise(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._disguise(item) for item in value]
        return value

    def _word(self, match: re.Match[str]) -> str:
        self.found.append(match[0])
        return f"x{self.secret}n{len(self.found) - 1}x"


def left_out(
    conversation: Conversation, index: int, text: Found | str, start: int = 0, end: int | None = None
) -> list[Field]:
    """What a message says that is not between two positions of a rendered text, once for each field. A field that
    `opens` lacks its beginning only: templates take a thought off the content.

    Args:
        text: With its marks, or without where they tell nothing.
    """
    if isinstance(text, Found):
        return conversation.marks.missing(index, text, start, len(text.text) if end is None else end)
    return unsaid(index, conversation.messages[index], text[start:end], conversation.tags)
