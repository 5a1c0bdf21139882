"""Marks: words in messages that nobody can guess, by which what was said is found in the text that a template makes.

Chat templates are a stranger's code. They drop calls and thoughts without a word, trim, move and repeat. So messages
are rendered a second time with marks beside the first and the last letters of their texts, after the name of each
call, and within each text and key of its arguments. Marks are made of letters and digits, and lie within whitespace
and tags at the ends of a text, so that templates that look at those (`'<think>' in content`,
`content.startswith(...)`) decide as they do without. Before a mark stands what it belongs to, to the letter, or the
template has changed it. Where the text without its marks is not the text that is rendered without them, they tell
nothing.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from .message_form import UNSAID, Message
from .text_search import EDGE, TAG, has_number, occurs, pieces, quoted

TAGS = 8
LEAD = re.compile(rf"(?:\s*<[^<>\n]{{1,{EDGE}}}>){{0,{TAGS}}}\s*")
SECRET = secrets.token_hex(8)
"""Of this process."""
MARK = re.compile(f"x{SECRET}m([0-9]+)x")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
NUMBER = re.compile(r"-?[0-9][0-9.eE+-]*|true|false")
WORD = re.compile(r"\w+")


class Field(msgspec.Struct, frozen=True):
    """What a mark stands beside."""

    message: int
    path: str
    """Within the message, as `tool_calls[0].function.arguments`."""
    rest: str = ""
    """What of the field follows the mark."""
    opens: bool = False
    """It stands at the beginning of the field."""
    text: str = ""
    """What ends with `rest`; of content and thoughts without whitespace at the ends."""
    changed: bool = False
    """It is there, but in other words."""

    @property
    def optional(self) -> bool:
        """Whether a prompt may lack it: it is a thought, or may be one at the beginning of the content."""
        return self.opens or self.path in UNSAID


class Found(msgspec.Struct, frozen=True):
    """A rendered text without its marks, and where they were: positions in ascending order, and their numbers."""

    text: str
    at: list[int]
    numbers: list[int]
    places: dict[int, list[int]] = msgspec.field(default_factory=dict)
    """Where each mark was."""

    def __post_init__(self) -> None:
        for place, number in zip(self.at, self.numbers, strict=True):
            self.places.setdefault(number, []).append(place)


class Marks:
    """The messages with marks.

    Args:
        messages: As templates are given them.
        tags: Matches the tags that the template may rewrite.
    """

    def __init__(self, messages: Sequence[Message], tags: re.Pattern[str] | None = None) -> None:
        self.tags = tags
        self.fields: list[Field] = []
        self.of_message: list[range] = []
        self.bare: dict[int, list[tuple[str, str]]] = defaultdict(list)
        """The texts without marks of each message: path, text."""
        self.numbers: dict[int, list[tuple[str, str]]] = defaultdict(list)
        """The numbers and truth values in the arguments of each message's calls: path, JSON."""
        self.messages: list[Message] = []
        for index, message in enumerate(messages):
            first = len(self.fields)
            self.messages.append(self._message(index, message))
            self.of_message.append(range(first, len(self.fields)))

    def find(self, rendered: str) -> Found:
        """Take the marks out of a text."""
        parts, at, numbers = [], list[int](), list[int]()
        position = before = 0
        for match in MARK.finditer(rendered):
            parts.append(rendered[before : match.start()])
            position += match.start() - before
            at.append(position)
            numbers.append(int(match[1]))
            before = match.end()
        parts.append(rendered[before:])
        return Found("".join(parts), at, numbers)

    def missing(self, message: int, found: Found, start: int, end: int) -> list[Field]:
        """The fields of a message of which a mark, or what belongs to it, is not between two positions of a text, each
        once."""
        lost: dict[str, Field] = {}
        own: list[int] = []
        for number in self.of_message[message]:
            field = self.fields[number]
            places = [place for place in found.places.get(number, ()) if start <= place <= end]
            own += places
            if not places:
                lost[field.path] = field
            elif field.text and not self._is_whole(field, found.text, places, start, end):
                lost.setdefault(field.path, msgspec.structs.replace(field, changed=True))
        if bare := self.bare.get(message):
            part = found.text[start:end]
            lost |= {path: Field(message, path) for path, text in bare if not occurs(text, part)}
        if numbers := self.numbers.get(message):
            following = bisect_right(found.at, max(own, default=end))  # the next mark of another message
            begin, stop = min(own, default=start), found.at[following] if following < len(found.at) else end
            for path, value in numbers:
                if not has_number(value, found.text, begin, min(end, stop)):
                    lost.setdefault(path, Field(message, path))
        return list(lost.values())

    def _is_whole(self, field: Field, rendered: str, places: list[int], start: int, end: int) -> bool:
        """Whether the template has what belongs to a mark, between two positions of a text, as it was.

        Args:
            places: Of the mark.
        """
        tail = field.rest.rstrip()
        for place in places:
            if rendered.endswith(field.text, start, place + len(tail)):  # nearly always
                return True
        for text, rest in zip(quoted(field.text), quoted(tail), strict=True):
            if any(rendered.endswith(text, start, place + len(rest)) for place in places):
                return True
        part = rendered[start:end]
        if "]." in field.path:  # arguments have other ways to escape quotes
            return all(word in part for word in WORD.findall(field.text))
        return all(occurs(piece, part) for piece in pieces(field.text, self.tags))

    def _message(self, index: int, message: Message) -> Message:
        marked = dict(message)
        for key in ("content", *UNSAID):
            if isinstance(value := message.get(key), str):
                marked[key] = self._text(index, key, value)
            elif isinstance(value, list):
                marked[key] = [{**part, "text": self._text(index, key, part["text"])} for part in value]
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._call(index, at, call) for at, call in enumerate(calls)]
        return marked

    def _text(self, index: int, path: str, text: str) -> str:
        start, end = edges(text)
        if start >= end:  # nothing but whitespace and tags
            if text.strip():
                self.bare[index].append((path, text))
            return text
        opening = self._mark(Field(index, path, opens=True))
        closing = self._mark(Field(index, path, text[end:], text=text.strip()))
        return text[:start] + opening + text[start:end] + closing + text[end:]

    def _call(self, index: int, at: int, call: Mapping[str, Any]) -> dict[str, Any]:
        path = f"tool_calls[{at}].function"
        function = dict(call["function"])
        if isinstance(name := function.get("name"), str):
            function["name"] = self._marked(index, f"{path}.name", name)
        if isinstance(arguments := function.get("arguments"), str):
            function["arguments"] = self._json(index, f"{path}.arguments", arguments)
        else:
            function["arguments"] = self._value(index, f"{path}.arguments", arguments)
        return {**call, "function": function}

    def _json(self, index: int, path: str, text: str) -> str:
        """A JSON text with a mark in each of its strings; another text with one at its end."""
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return self._marked(index, path, text) if text else text
        self.numbers[index] += [(path, word) for word in NUMBER.findall(STRING.sub(" ", text))]
        return STRING.sub(lambda match: f'"{self._marked(index, path, match[0][1:-1])}"', text)

    def _value(self, index: int, path: str, value: Any) -> Any:
        if isinstance(value, str):
            return self._marked(index, path, value)
        if isinstance(value, Mapping):
            return {self._marked(index, path, key): self._value(index, path, each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(index, path, each) for each in value]
        if isinstance(value, int | float):
            self.numbers[index].append((path, json.dumps(value)))
        return value

    def _marked(self, index: int, path: str, text: str) -> str:
        return text + self._mark(Field(index, path, text=text.lstrip()))

    def _mark(self, field: Field) -> str:
        self.fields.append(field)
        return f"x{SECRET}m{len(self.fields) - 1}x"


def edges(text: str) -> tuple[int, int]:
    """Where the whitespace and tags end with which a text begins, and where those begin with which it ends; a few tags
    at most."""
    lead = LEAD.match(text)
    start, end = lead.end() if lead else 0, len(text)
    for _ in range(TAGS + 1):
        while end > start and text[end - 1].isspace():
            end -= 1
        opening = text.rfind("<", max(start, end - EDGE), end)
        if not text.endswith(">", start, end) or opening < 0 or "\n" in text[opening:end]:
            break
        end = opening
    return start, max(start, end)


def shape_of(message: Message) -> Hashable:
    """What of a message templates may look at, but for its words: which keys it has, how its content is made, and the
    keys in the arguments of its calls, and what of them is empty, 0 or false."""
    calls = tuple(_skeleton(call["function"].get("arguments")) for call in message.get("tool_calls") or ())
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    return tuple(sorted(message)), content is None, bool(text.strip()), bool(TAG.search(text)), calls


def _skeleton(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _skeleton(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return frozenset(map(_skeleton, value)), bool(value)
    return type(value).__name__, bool(value)


def unsaid(index: int, message: Message, rendered: str, tags: re.Pattern[str] | None) -> list[Field]:
    """Like `Marks.missing`, by the texts themselves: for where marks tell nothing."""
    lost: dict[str, Field] = {}
    for path, text in _said(message):
        *before, last = pieces(text, tags)
        if not occurs(last, rendered):
            lost[path] = Field(index, path)
        elif not all(occurs(part, rendered) for part in before):
            lost.setdefault(path, Field(index, path, opens=True))
    return list(lost.values())


def _said(message: Message) -> Iterator[tuple[str, str]]:
    """Each field of a message with each text in it."""
    for key in ("content", *UNSAID):
        value = message.get(key)
        for text in [value] if isinstance(value, str) else [part["text"] for part in value or ()]:
            yield key, text
    for at, call in enumerate(message.get("tool_calls") or ()):
        function = call["function"]
        yield f"tool_calls[{at}].function.name", str(function.get("name") or "")
        yield from ((f"tool_calls[{at}].function.arguments", text) for text in leaves(function.get("arguments")))


def leaves(value: Any) -> Iterator[str]:
    """Every text and key in a value; a JSON text is one value."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, str):
        yield value
