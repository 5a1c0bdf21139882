"""Chat rows as tokens, with a loss on what the assistant said, for any chat template.

A template is code, so what an assistant's turn looks like is found by rendering, not by parsing: the turn is what
`messages[:i + 1]` adds to `messages[:i]` with a generation prompt. The prompt is then, to the letter, what an engine
will send (`arbor_core.data.chat_format` prepares messages for both), and the answer ends with the token that stops it.

Most templates render a conversation so that each turn is a prefix of the next, and the row becomes one sequence. Some
rewrite earlier turns (they drop old reasoning, or move the system prompt to the last question); those rows become one
sequence for each trained turn, each rendered as the engine will see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from arbor_core import Chats, ChatText, Conversation

IGNORED = -100
"""Label of a token without loss."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation, and the parts of its text to learn, as character offsets."""

    chat: ChatText
    spans: tuple[Span, ...]
    close: bool = False
    """The template does not end the last turn: the tokenizer's end token has to be added."""

    @property
    def text(self) -> str:
        return self.chat.text


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
        self.chats = Chats(tokenizer)
        self.stops = sorted({*self.chats.tokens, *tokenizer.all_special_tokens})

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that may end a turn."""
        return {int(self.tokenizer.get_vocab()[word]) for word in self.stops}

    def learned_ends(self, samples: Iterable[Sample]) -> set[int]:
        """The tokens that ended the turns which these samples teach."""
        return {sample.last_trained for sample in samples} & self.stop_ids

    def turn_end(self) -> set[int]:
        """The token that ends any turn."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return self.learned_ends(self.encode([self.turn(self.chats.conversation(messages, None), 1)]))

    def render(self, row: dict[str, Any]) -> list[Rendered]:
        """The texts to train on for one row.

        Raises:
            ValueError: the template refuses the row, or its turns do not continue its generation prompt.
        """
        messages = row["messages"]
        trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0]
        # nothing later has a loss
        conversation = self.chats.conversation(messages[: trained[-1] + 1], row.get("tools"))
        turns = [self.turn(conversation, i) for i in trained]
        whole = turns[-1].text
        if all(whole.startswith(turn.text) and not turn.close for turn in turns[:-1]):
            return [Rendered(turns[-1].chat, tuple(turn.spans[0] for turn in turns), turns[-1].close)]
        return turns

    def turn(self, conversation: Conversation, index: int) -> Rendered:
        """The message at an index, an assistant's, as the engine would have generated it."""
        if index == 0:
            raise ValueError("messages[0] is an assistant's and answers nothing: put a message before it, or weight 0")
        before = self.text(conversation, index, prompt=True)
        after = self.text(conversation, index + 1, prompt=False)
        if not after.startswith(before):
            raise ValueError(
                "the model's chat template renders an assistant's turn otherwise than its generation prompt begins, so "
                f"what to learn is unclear: it prompts with {before[-40:]!r} and renders "
                f"{after[max(0, len(before) - 40) :][:80]!r}"
            )
        answer = after[len(before) :]
        ends = [answer.rfind(word) + len(word) for word in self.stops if word in answer]
        ended = bool(ends) and not answer[max(ends) :].strip()  # what follows, a line break, is never generated
        if not ended and not self.tokenizer.eos_token:
            raise ValueError("the model's chat template does not end a turn, and its tokenizer has no end token")
        end = len(before) + max(ends) if ended else len(after)
        span = (len(conversation.lift(before)), len(conversation.lift(after[:end])))
        return Rendered(conversation.reveal(after), (span,), close=not ended)

    def text(self, conversation: Conversation, count: int, *, prompt: bool) -> str:
        """The first messages as the template writes them, control tokens in them disguised."""
        try:
            return self.chats.render(conversation, count, prompt=prompt)
        except (TemplateError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"the model's chat template refuses it: {error}") from None

    def encode(self, texts: Sequence[Rendered]) -> list[Sample]:
        """Tokens and labels. Where a token would straddle the beginning of a turn, the text is cut there, as it is when
        an engine tokenises the prompt alone."""
        plain = [rendered.text for rendered in texts if rendered.chat.controls is None]
        found = self.tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True) if plain else {}
        whole = zip(found.get("input_ids", ()), found.get("offset_mapping", ()), strict=True)
        encoded = [
            next(whole) if one.chat.controls is None else self.chats.encode(one.chat, offsets=True) for one in texts
        ]
        return [self._labelled(one, *tokens) for one, tokens in zip(texts, encoded, strict=True)]

    def _labelled(self, rendered: Rendered, ids: list[int], extents: list[Span]) -> Sample:
        cuts = [edge for span in rendered.spans for edge in span]
        if not set(cuts) <= _edges(extents):
            ids, extents = self.chats.encode(rendered.chat, cuts, offsets=True)
        inside = [any(start <= at and end <= stop for start, stop in rendered.spans) for at, end in extents]
        labels = [token if learn else IGNORED for token, learn in zip(ids, inside, strict=True)]
        if rendered.close:
            end = self.tokenizer.eos_token_id
            ids, labels = [*ids, end], [*labels, end]
        labels[:1] = [IGNORED]  # nothing precedes it
        return Sample(ids, labels)


def _edges(extents: Sequence[Span]) -> set[int]:
    """Where one token certainly ends and the next begins. Some tokenizers leave spaces out of the offsets, and do not
    say which neighbour holds them; the characters of one letter's several bytes overlap."""
    ends = [0, *(end for _, end in extents)]
    starts = [*(start for start, _ in extents), ends[-1]]
    return {end for end, start in zip(ends, starts, strict=True) if start == end}
