"""Conversations on their way to tokens, the same for whoever trains a model and whoever serves it.

Were one of them to write a tool call differently, or to read a control token where the other reads text, a fine-tuned
model would see prompts that differ from those it was trained on. So messages are prepared, rendered and encoded here
for both. The tokenizer is the caller's; no library of tokenizers is imported.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    chat_template: Any

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...
    @property
    def apply_chat_template(self) -> Callable[..., Any]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class ChatText(msgspec.Struct, frozen=True):
    """A rendered conversation.

    `controls` is None where every control token in the text is the template's, so that it can be tokenised as it is.
    Otherwise a message contains some too: these are the template's, and what lies between them is to be tokenised with
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
        tokenizer: Used by one thread at a time. `developer` stays a role of its own where its template names it; the
            special ones among its added tokens are control tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, added = tokenizer, tokenizer.added_tokens_decoder
        self.knows_developer = "developer" in str(tokenizer.chat_template)
        self.tokens = {token.content: number for number, token in added.items() if token.special}
        self.strips = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def conversation(self, messages: Iterable[Mapping[str, Any]], tools: Sequence[Any] | None) -> Conversation:
        """Messages and tools of OpenAI's API, ready for the template.

        Raises:
            ValueError: one of them is nested too deeply.
        """
        return Conversation(self.control, [self.message(each) for each in messages], list(tools or []) or None)

    def message(self, given: Mapping[str, Any]) -> Message:
        """A message as templates are written for: text content, tool arguments as objects, nothing that is null."""
        message = {key: value for key, value in given.items() if value is not None and key not in HIDDEN_KEYS}
        message["content"] = text_of(given)
        if given["role"] == "developer" and not self.knows_developer:
            message["role"] = "system"
        if given["role"] == "function":
            message["role"] = "tool"
        calls = list(given.get("tool_calls") or [])
        if call := given.get("function_call"):
            calls.append({"type": "function", "function": call})
        if calls:
            message["tool_calls"] = [with_arguments(call) for call in calls]
        return message

    def render(
        self,
        conversation: Conversation,
        count: int | None = None,
        *,
        prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The first `count` messages as the template writes them, control tokens in them disguised: see `reveal`.

        Args:
            prompt: Whether the generation prompt follows.
            variables: Others for the template, by name.

        Raises:
            Exception: whatever the template raises; it is a stranger's code.
        """
        rendered = self.tokenizer.apply_chat_template(
            conversation.messages[:count],
            tools=conversation.tools,
            add_generation_prompt=prompt,
            tokenize=False,
            **(variables or {}),
        )
        return str(rendered)

    def encode(
        self, text: ChatText, cuts: Iterable[int] = (), *, offsets: bool = False
    ) -> tuple[list[int], list[Span]]:
        """The tokens of a text, and with `offsets` the characters that each covers (a fast tokenizer only).

        Args:
            cuts: Characters where a token has to begin.
        """
        as_text = {} if text.controls is None else {"split_special_tokens": True}
        ids: list[int] = []
        extents: list[Span] = []
        for piece in self.pieces(text, cuts):
            if piece.token is not None:
                ids.append(piece.token)
                extents.append((piece.start, piece.start + len(piece.text)))
                continue
            encoded = self.tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=offsets, **as_text)
            ids += encoded["input_ids"]
            extents += [(piece.start + at, piece.start + stop) for at, stop in encoded.get("offset_mapping", ())]
        return ids, extents if offsets else []

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
        self.messages: list[Message] = self._disguise(messages)
        self.tools: list[Any] | None = self._disguise(tools)

    def reveal(self, rendered: str) -> ChatText:
        """The rendered text with the control tokens of the messages as they were written."""
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
        """A part of the rendered text as it was written."""
        return re.sub(f"x{self.secret}n([0-9]+)x", lambda match: self.found[int(match[1])], rendered)

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


HIDDEN_KEYS = ("weight", "function_call")
"""Keys of a message that no template sees: `weight` is for the trainer, `function_call` becomes a tool call."""


def text_of(message: Mapping[str, Any]) -> str:
    """A message's text: parts one after the other; a refusal where there is nothing else."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or part.get("refusal") or "" for part in content)
    return str(content or message.get("refusal") or "")


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
