"""Conversations on their way to tokens, the same for whoever trains a model and whoever serves it.

Were one of them to write a tool call differently, or to read a control token where the other reads text, a fine-tuned
model would see prompts that differ from those it was trained on. So messages are prepared, rendered and encoded here
for both. The tokenizer is the caller's; no library of tokenizers is imported.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Protocol

import msgspec

from .conversation import ChatText, Conversation, LeftOutError, Span, left_out
from .marks import Found, shape_of
from .message_form import Message, MessageForm, find_form, tool_of
from .text_search import tags_in

REMEMBERED = 10_000
"""Shapes of messages."""


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


class Piece(msgspec.Struct, frozen=True):
    """A part of a text from character `start` on. `token`: it is a control token, and no text to be tokenised."""

    start: int
    text: str
    token: int | None = None


class Chats:
    """Conversations for one tokenizer and its chat template.

    Args:
        tokenizer: Used by one thread at a time. `developer` stays a role of its own where its template writes it; the
            special ones among its added tokens are control tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, added = tokenizer, tokenizer.added_tokens_decoder
        self.forms: dict[tuple[str, bool], MessageForm] = {}
        self.dropped: set[Hashable] = set()
        """Shapes of messages that the template writes and drops when others follow."""
        self.tokens = {token.content: number for number, token in added.items() if token.special}
        self.strips = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def conversation(self, messages: Iterable[Mapping[str, Any]], tools: Sequence[Any] | None) -> Conversation:
        """Messages and tools of OpenAI's API, ready for the template.

        Raises:
            ValueError: one of them is nested too deeply.
        """
        given, tools = list(messages), [tool_of(tool) for tool in tools or ()]
        prepared = [self.message(each, tools=bool(tools)) for each in given]
        return Conversation(self.control, prepared, tools or None, given, tags_in(str(self.tokenizer.chat_template)))

    def message(self, given: Mapping[str, Any], *, tools: bool = False) -> Message:
        """A message in the form that the template takes, without what is null or empty.

        Args:
            tools: There are tools beside the messages.
        """
        message = self.form(tools).message(given)
        if given["role"] == "developer" and not self.knows_developer:
            message["role"] = "system"
        if given["role"] == "function":
            message["role"] = "tool"
        return message

    def form(self, tools: bool) -> MessageForm:
        """How the template takes messages; tried once. With tools a tokenizer may use another template."""
        key = (str(self.tokenizer.chat_template), tools)
        if key not in self.forms:
            self.forms[key] = find_form(partial(self._apply, prompt=False), tools=tools)
        return self.forms[key]

    def render(
        self,
        conversation: Conversation,
        count: int | None = None,
        *,
        prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        marked: bool = False,
    ) -> str:
        """The first `count` messages as the template writes them, control tokens in them disguised: see `reveal`.

        Args:
            prompt: Whether the generation prompt follows.
            variables: Others for the template, by name.
            marked: With `conversation.marks`.

        Raises:
            Exception: whatever the template raises; it is a stranger's code.
        """
        messages = conversation.marks.messages if marked else conversation.messages
        return self._apply(messages[:count], conversation.tools, prompt=prompt, variables=variables)

    def _apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        # as a batch of one: an empty conversation is taken for none otherwise
        (rendered,) = self.tokenizer.apply_chat_template(
            [list(messages)], tools=tools, add_generation_prompt=prompt, tokenize=False, **(variables or {})
        )
        return str(rendered)

    def check_said(
        self,
        conversation: Conversation,
        messages: Iterable[int],
        text: Found | str,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that a text has what earlier messages say. Templates may drop earlier thoughts, so what it lacks counts
        as lost where the text that ends with its message lacks it too.

        Args:
            messages: Their numbers.
            text: The conversation as rendered, with its marks, or without where they tell nothing.

        Raises:
            LeftOutError: naming the first field that is lost.
        """
        for index in messages:
            shape = (shape_of(conversation.messages[index]), bool(conversation.tools))
            if shape in self.dropped or all(field.optional for field in left_out(conversation, index, text)):
                continue
            try:
                own = self.render(conversation, index + 1, prompt=False, variables=variables)
            except Exception:  # the template's: nothing excuses what is lost
                own = ""
            found = self.marked(conversation, own, index + 1, prompt=False, variables=variables)
            for field in left_out(conversation, index, found or own):
                if not field.optional:
                    raise LeftOutError(conversation.field(index, field.path), changed=field.changed)
            if len(self.dropped) < REMEMBERED:
                self.dropped.add(shape)

    def prompt(self, conversation: Conversation, variables: Mapping[str, Any] | None = None) -> ChatText:
        """The prompt that asks for the next turn.

        Raises:
            LeftOutError: the template leaves out what the assistant said before.
            Exception: whatever the template raises.
        """
        rendered = self.render(conversation, variables=variables)
        if spoke := [at for at, message in enumerate(conversation.messages) if message["role"] == "assistant"]:
            found = self.marked(conversation, rendered, prompt=True, variables=variables)
            self.check_said(conversation, spoke, found or rendered, variables)
        return conversation.reveal(rendered)

    def opening(self, tools: Sequence[Any] | None) -> str:
        """What the generation prompt adds to a question; empty: the template rewrites the question."""
        question = self.conversation([{"role": "user", "content": "Hi"}], None)
        messages = question.messages
        try:
            prompt, plain = (self._apply(messages, tools, prompt=prompt) for prompt in (True, False))
        except Exception:  # the template's
            return ""
        return prompt[len(plain) :] if prompt.startswith(plain) else ""

    @cached_property
    def knows_developer(self) -> bool:
        """Whether the template writes what developers say; else it is a system prompt."""
        word = f"w{secrets.token_hex(6)}"
        developer = {"role": "developer", "content": word}
        return "developer" in str(self.tokenizer.chat_template) and word in (self._trial([developer], None) or "")

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the template writes tools into a prompt; yes where that cannot be told."""
        name = f"w{secrets.token_hex(6)}"
        function = {"name": name, "description": "Looks it up.", "parameters": {"type": "object", "properties": {}}}
        prompt = self._trial([], [{"type": "function", "function": function}])
        return prompt is None or name in prompt

    def _trial(self, messages: list[Message], tools: list[Any] | None) -> str | None:
        """The prompt of a question after some messages; None: the template refuses it."""
        form = self.form(False)
        try:
            question = {"role": "user", "content": "Hi"}
            return self._apply([form.message(each) for each in (*messages, question)], tools, prompt=True)
        except Exception:  # the template's
            return None

    def marked(
        self,
        conversation: Conversation,
        rendered: str,
        count: int | None = None,
        *,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> Found | None:
        """The marks in the text that the template makes of the first `count` messages; None: they change the text, so
        they tell nothing.

        Args:
            rendered: That text without marks.
        """
        try:
            text = self.render(conversation, count, prompt=prompt, variables=variables, marked=True)
        except Exception:  # the template's; it rendered the same without marks
            return None
        found = conversation.marks.find(text)
        return found if found.text == rendered else None

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
