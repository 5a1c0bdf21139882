"""Conversations on their way to tokens, the same for whoever trains a model and whoever serves it.

Were one of them to spell a tool call otherwise, or to read a control token where the other reads text, a fine-tuned
model would be asked in another way than it was taught. What needs a tokenizer is left to the caller, who knows its
library; here is only what must not differ.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import msgspec

from arbor_core.storage.codec import check_depth

Message = dict[str, Any]
Span = tuple[int, int]


class AddedToken(Protocol):
    """What tokenizers say of a token that is not made of pieces."""

    @property
    def content(self) -> str: ...
    @property
    def special(self) -> bool: ...
    @property
    def lstrip(self) -> bool: ...
    @property
    def rstrip(self) -> bool: ...


class ChatText(msgspec.Struct, frozen=True):
    """A rendered conversation.

    `controls` is None where every control token in the text is the template's, so that it can be tokenised as it is.
    Otherwise a message spells some too: these are the template's, and what lies between them is to be tokenised with
    control tokens as text (`split_special_tokens`).
    """

    text: str
    controls: tuple[Span, ...] | None = None


class Piece(msgspec.Struct, frozen=True):
    """A part of a text from character `start` on. `token`: it is a control token, and no text to be tokenised."""

    start: int
    text: str
    token: int | None = None


class Chats:
    """Conversations for one tokenizer and its chat template.

    Args:
        template: The chat template; `developer` stays a role of its own where the template names it.
        added: The tokenizer's added tokens by id; the special ones among them are control tokens.
    """

    def __init__(self, template: object, added: Mapping[int, AddedToken]) -> None:
        self.knows_developer = "developer" in str(template)
        self.tokens = {token.content: number for number, token in added.items() if token.special}
        self.strips = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def conversation(self, messages: Iterable[Mapping[str, Any]], tools: Sequence[Any] | None) -> Conversation:
        """Messages and tools of OpenAI's API, ready for the template.

        Raises:
            ValueError: one of them is nested too deeply.
        """
        return Conversation(self.control, [self.message(said) for said in messages], list(tools or []) or None)

    def message(self, said: Mapping[str, Any]) -> Message:
        """A message as templates are written for: text content, tool arguments as objects, nothing that is null."""
        message = {key: value for key, value in said.items() if value is not None and key not in UNTOLD}
        message["content"] = spoken(said)
        if said["role"] == "developer" and not self.knows_developer:
            message["role"] = "system"
        if said["role"] == "function":
            message["role"] = "tool"
        calls = list(said.get("tool_calls") or [])
        if call := said.get("function_call"):
            calls.append({"type": "function", "function": call})
        if calls:
            message["tool_calls"] = [with_arguments(call) for call in calls]
        return message

    def pieces(self, text: ChatText, cuts: Iterable[int] = ()) -> Iterator[Piece]:
        """A text in pieces to be tokenised one by one, cut at `cuts` and around `text.controls`."""
        controls = dict(text.controls or ())
        edges = sorted({0, len(text.text), *cuts, *controls, *controls.values()})
        before = ""
        for start, end in pairwise(edges):
            words = text.text[start:end]
            if start in controls:
                yield Piece(start, words, self.tokens[words])
                before = words
                continue
            after = text.text[end : controls[end]] if end in controls else ""
            bare = words.lstrip() if before and self.strips[before][1] else words
            yield Piece(end - len(bare), bare.rstrip() if after and self.strips[after][0] else bare)
            before = ""


class Conversation:
    """Messages and tools in which control tokens are disguised while the template runs (row 138): replaced by words
    that nobody can guess, so that whatever control tokens the template puts out are its own.

    Args:
        control: Matches the control tokens.

    Raises:
        ValueError: a message or tool is nested too deeply.
    """

    def __init__(self, control: re.Pattern[str] | None, messages: list[Message], tools: list[Any] | None) -> None:
        self.control, self.secret = control, secrets.token_hex(12)
        self.found: list[str] = []
        for name, values in (("messages", messages), ("tools", tools or ())):
            for index, value in enumerate(values):
                check_depth(value, f"{name}[{index}]")
        self.messages: list[Message] = self._cover(messages)
        self.tools: list[Any] | None = self._cover(tools)

    def reveal(self, rendered: str) -> ChatText:
        """What the template has made of it, with the control tokens of the messages as they were spelled."""
        if self.control is None or self.secret not in rendered:
            return ChatText(rendered)
        text, controls = "", []
        at = 0
        for match in self.control.finditer(rendered):
            text += self.lift(rendered[at : match.start()])
            controls.append((len(text), len(text) + len(match[0])))
            text, at = text + match[0], match.end()
        return ChatText(text + self.lift(rendered[at:]), tuple(controls))

    def lift(self, rendered: str) -> str:
        """A part of the rendered text as it was spelled."""
        return re.sub(f"x{self.secret}n([0-9]+)x", lambda match: self.found[int(match[1])], rendered)

    def _cover(self, value: Any) -> Any:
        """The same value with every string in it covered."""
        if isinstance(value, str):
            return self.control.sub(self._word, value) if self.control else value
        if isinstance(value, Mapping):
            return {self._cover(key): self._cover(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._cover(item) for item in value]
        return value

    def _word(self, match: re.Match[str]) -> str:
        self.found.append(match[0])
        return f"x{self.secret}n{len(self.found) - 1}x"


UNTOLD = ("weight", "function_call")
"""Keys of a message that no template sees: the one is for the trainer, the other becomes a tool call."""


def spoken(said: Mapping[str, Any]) -> str:
    """A message's text: parts one after the other; a refusal where there is nothing else."""
    content = said.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or part.get("refusal") or "" for part in content)
    return str(content or said.get("refusal") or "")


def with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object. A model may have written what is no JSON object, or one that is nested
    too deeply: that stays text."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
        check_depth(parsed, "arguments")
    except (ValueError, RecursionError):
        parsed = None
    return {**call, "function": {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}}
