"""Chat rows as tokens, with a loss on what the assistant said.

What an engine would be sent and would have generated is found by `turns`. Most templates render a conversation so
that each turn is a prefix of the next, and the row becomes one sequence. Some rewrite earlier turns (they drop old
thoughts, or move the system prompt to the last question); those rows become a sequence for each of the turns that end
one rendering, with all turns that it has as they were generated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arbor_core import UNSAID, Chats, ChatText, Conversation, LeftOutError, left_out

from .token_spans import TokenSpans
from .turns import Turn, Turns

if TYPE_CHECKING:  # row_check does without torch, which transformers imports
    from transformers import PreTrainedTokenizerBase

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
        self.spans = TokenSpans(self.chats)
        self.stops = sorted({*self.chats.tokens, *tokenizer.all_special_tokens})
        longest_first = sorted(self.stops, key=len, reverse=True)
        self.stop = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

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

    def render(self, row: dict[str, Any], warn: Callable[[str], None] | None = None) -> list[Rendered]:
        """The texts to train on for one row.

        Args:
            warn: Called with what the template leaves out and the row can do without: each key of a thought, which is
                not learned, and what others than the assistant say.

        Raises:
            LeftOutError: the template leaves out what an assistant said.
            ValueError: the template refuses the row, or its turns do not continue its generation prompt.
        """
        messages = row["messages"]
        spoke = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in spoke if messages[i].get("weight", 1) != 0]
        # nothing later has a loss
        conversation = self.chats.conversation(messages[: trained[-1] + 1], row.get("tools"))
        sequences = self._turns(conversation).sequences(trained)
        for turn, spans in sequences:
            for index, span in spans.items():
                self._check(conversation, index, turn, span, warn)
        context = sorted({i for i in spoke if i < trained[-1]}.difference(trained))
        self.chats.check_said(conversation, context, sequences[-1][0].found or sequences[-1][0].text)
        if warn:
            for unread in self._unread(conversation, sequences[-1][0]):
                warn(unread)
        return [self._rendered(conversation, turn, list(spans.values())) for turn, spans in sequences]

    def turn(self, conversation: Conversation, index: int, *, sampled: bool = False) -> Rendered:
        """The message at an index, an assistant's, as the engine would have generated it.

        Args:
            sampled: It is what a policy has sampled: a thought that the prompt opens is not closed for it.

        Raises:
            LeftOutError: the template leaves out what an assistant said.
            ValueError: the template refuses it, or the turn does not continue its generation prompt.
        """
        turn = self._turns(conversation, sampled=sampled).turn(index)
        self._check(conversation, index, turn, (turn.begin, turn.end), None)
        context = [i for i, message in enumerate(conversation.messages[:index]) if message["role"] == "assistant"]
        self.chats.check_said(conversation, context, turn.found or turn.text)
        return self._rendered(conversation, turn, [(turn.begin, turn.end)])

    def _turns(self, conversation: Conversation, *, sampled: bool = False) -> Turns:
        closable = bool(self.tokenizer.eos_token)
        return Turns(self.chats, conversation, self.stop, closable=closable, sampled=sampled)

    def _check(
        self, conversation: Conversation, index: int, turn: Turn, span: Span, warn: Callable[[str], None] | None
    ) -> None:
        """Check that a message is in the text that is learned."""
        for field in left_out(conversation, index, turn.found or turn.text, *span):
            if field.path not in UNSAID:
                raise LeftOutError(conversation.field(index, field.path), changed=field.changed)
            if warn:
                warn(conversation.field(index, field.path).rpartition(".")[2])

    def _unread(self, conversation: Conversation, turn: Turn) -> Iterator[str]:
        """What others than the assistant say that the text of a turn lacks."""
        if conversation.tools and not self.chats.reads_tools:
            yield "the list of tools"
        for index, message in enumerate(conversation.messages):
            lost = message["role"] != "assistant" and left_out(conversation, index, turn.found or turn.text)
            if lost and not all(field.changed for field in lost):
                yield f"what {message['role']} messages say"

    def _rendered(self, conversation: Conversation, turn: Turn, spans: list[Span]) -> Rendered:
        text, edges = conversation.reveal_with(turn.text, [edge for span in spans for edge in span])
        return Rendered(text, tuple(zip(edges[::2], edges[1::2], strict=True)), turn.close)

    def encode(self, texts: Sequence[Rendered]) -> list[Sample]:
        """Tokens and labels. Where a token would straddle the beginning of a turn, the text is cut there, as it is when
        an engine tokenises the prompt alone."""
        plain = iter(self.spans.ids([one.text for one in texts if one.chat.controls is None]))
        return [self._sample(one, next(plain) if one.chat.controls is None else None) for one in texts]

    def _sample(self, rendered: Rendered, whole: list[int] | None) -> Sample:
        """Tokens and labels of one text.

        Args:
            whole: The tokens of all of it; None: messages in it spell control tokens.
        """
        spans = None if whole is None else self.spans.by_controls(rendered.text, whole, rendered.spans)
        if whole is None or spans is None:
            whole, spans = self.spans.by_offsets(rendered.chat, rendered.spans)
        ids, labels = whole, [IGNORED] * len(whole)
        for first, last in spans:
            labels[first:last] = ids[first:last]
        if rendered.close:
            end = self.tokenizer.eos_token_id
            ids, labels = [*ids, end], [*labels, end]
        labels[:1] = [IGNORED]  # nothing precedes it
        return Sample(ids, labels)
