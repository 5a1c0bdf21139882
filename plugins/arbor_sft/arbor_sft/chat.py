"""Chat rows as tokens, with a loss on what the assistant said, for any chat template.

A template is code, so what an assistant's turn looks like is found by rendering, not by parsing: the turn is what
`messages[:i + 1]` adds to `messages[:i]` with a generation prompt. The prompt is then, to the letter, what an engine
will send, and the answer ends with the token that stops it.

Most templates render a conversation so that each turn is a prefix of the next, and the row becomes one sequence. Some
rewrite earlier turns (they drop old reasoning, or move the system prompt to the last question); those rows become one
sequence for each trained turn, each rendered as the engine will see it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token without loss."""

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A text, and the parts of it to learn, as character offsets."""

    text: str
    spans: tuple[Span, ...]
    close: bool = False
    """The template does not end the last turn: the tokenizer's end token has to be added."""


@dataclass(frozen=True)
class Sample:
    """One training sequence; `labels` are the ids where there is loss, else -100."""

    ids: list[int]
    labels: list[int]
    line: int = 0

    def cut(self, length: int) -> Sample:
        return Sample(self.ids[:length], self.labels[:length], self.line)

    @property
    def trained(self) -> int:
        """Number of tokens with loss."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def last_trained(self) -> int:
        """The last token with loss."""
        return next(label for label in reversed(self.labels) if label != IGNORED)


class ChatFormat:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError where the tokenizer has no template or cannot tell which characters a token covers."""
        if not tokenizer.chat_template:
            raise ValueError(
                "its tokenizer has no chat template: use the model's instruct variant, or put a chat_template.jinja "
                "beside its weights"
            )
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer has no tokenizer.json (a fast tokenizer), which gives tokens their offsets")
        self.tokenizer = tokenizer
        self.knows_developer = "developer" in str(tokenizer.chat_template)
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.stops = sorted(special | set(tokenizer.all_special_tokens))

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that may end a turn."""
        return {int(self.tokenizer.get_vocab()[word]) for word in self.stops}

    def render(self, row: dict[str, Any]) -> list[Rendered]:
        """The texts to train on for one row.

        Raises:
            ValueError: the template refuses the row, or its turns do not continue its generation prompt.
        """
        said = row["messages"]
        trained = [i for i, m in enumerate(said) if m["role"] == "assistant" and m.get("weight", 1) != 0]
        messages = [self.message(m) for m in said[: trained[-1] + 1]]  # nothing later has a loss
        tools = row.get("tools") or None
        turns = [self.turn(messages[: i + 1], tools) for i in trained]
        whole = turns[-1].text
        if all(whole.startswith(turn.text) and not turn.close for turn in turns[:-1]):
            return [Rendered(whole, tuple(turn.spans[0] for turn in turns), turns[-1].close)]
        return turns

    def turn(self, messages: Sequence[Message], tools: list[Any] | None) -> Rendered:
        """The last message, an assistant's, as the engine would have generated it."""
        before = self.text(messages[:-1], tools, prompt=True)
        after = self.text(messages, tools, prompt=False)
        if not after.startswith(before):
            raise ValueError(
                "the model's chat template renders an assistant's turn otherwise than its generation prompt begins, so "
                f"what to learn is unclear: it prompts with {before[-40:]!r} and renders "
                f"{after[max(0, len(before) - 40) :][:80]!r}"
            )
        answer = after[len(before) :]
        ends = [answer.rfind(word) + len(word) for word in self.stops if word in answer]
        if ends and not answer[max(ends) :].strip():  # what follows, a line break, is never generated
            return Rendered(after, ((len(before), len(before) + max(ends)),))
        if not self.tokenizer.eos_token:
            raise ValueError("the model's chat template does not end a turn, and its tokenizer has no end token")
        return Rendered(after, ((len(before), len(after)),), close=True)

    def text(self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False
                )
            )
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"the model's chat template refuses it: {error}") from None

    def message(self, said: Message) -> Message:
        """A message of OpenAI's API as chat templates expect it: text content, tool arguments as objects."""
        message = {key: value for key, value in said.items() if key not in ("weight", "function_call")}
        content = said.get("content")
        message["content"] = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
        if said["role"] == "developer" and not self.knows_developer:
            message["role"] = "system"
        if said["role"] == "function":
            message["role"] = "tool"
        calls = said.get("tool_calls") or []
        if call := said.get("function_call"):
            calls = [*calls, {"type": "function", "function": call}]
        if calls:
            message["tool_calls"] = [_with_arguments(call) for call in calls]
        return message

    def encode(self, texts: Sequence[Rendered]) -> list[Sample]:
        """Tokens and labels. Where a token would straddle the beginning of a turn, the text is cut there, as it is when
        an engine tokenises the prompt alone."""
        found = self.tokenizer(
            [rendered.text for rendered in texts], add_special_tokens=False, return_offsets_mapping=True
        )
        return [
            self._labelled(rendered, ids, offsets)
            for rendered, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True)
        ]

    def _labelled(self, rendered: Rendered, ids: list[int], extents: list[Span]) -> Sample:
        cuts = [edge for span in rendered.spans for edge in span]
        if not set(cuts) <= _edges(extents):
            ids, extents = self._in_pieces(rendered.text, cuts)
        inside = [any(start <= at and end <= stop for start, stop in rendered.spans) for at, end in extents]
        labels = [token if learn else IGNORED for token, learn in zip(ids, inside, strict=True)]
        if rendered.close:
            end = self.tokenizer.eos_token_id
            ids, labels = [*ids, end], [*labels, end]
        labels[:1] = [IGNORED]  # nothing precedes it
        return Sample(ids, labels)

    def _in_pieces(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        extents: list[Span] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = self.tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
            ids += piece["input_ids"]
            extents += [(start + at, start + stop) for at, stop in piece["offset_mapping"]]
        return ids, extents


def _edges(extents: Sequence[Span]) -> set[int]:
    """Where one token certainly ends and the next begins. Some tokenizers leave spaces out of the offsets, and do not
    say which neighbour holds them; the characters of one letter's several bytes overlap."""
    ends = [0, *(end for _, end in extents)]
    starts = [*(start for start, _ in extents), ends[-1]]
    return {end for end, start in zip(ends, starts, strict=True) if start == end}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object; text that is no JSON object stays text."""
    function = dict(call.get("function") or {})
    if isinstance(arguments := function.get("arguments"), str):
        try:
            parsed = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}
