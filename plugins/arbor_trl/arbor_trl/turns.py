"""Where an assistant's turns are in the text that a chat template makes of a conversation.

A template is code, so what a turn looks like is found by rendering, not by parsing: it is what `messages[:i + 1]`
adds to `messages[:i]` with a generation prompt. The prompt is then, to the letter, what an engine will send, and the
answer ends with the token that stops it. Where the template writes the prompt otherwise when a turn follows, the
answer is what it writes after what the last message before the turn and the generation prompt have in common with it:

- it moves the system prompt into the last question, and drops it from a conversation that ends with an answer
  (Mistral);
- it prompts for a thought (`<think>`) that it does not write where there is none, or never (DeepSeek-R1's
  distillations): the thought is written as such models write it, and closed.

Rendering every prefix would cost the square of the number of turns. So a conversation is rendered once, with and
without marks (`arbor_core.data.marks`). Prefixes are rendered for a few turns and for the first and the last turn of
each kind in a longer one; a kind is what a turn and its neighbours are made of, and what follows. Turns whose
prefixes are no prefixes of the whole are for other sequences. The others of a kind are found by their marks, by the
text between the message before and the beginning of the turn, and by the token that ends it: what is not there word
for word is rendered by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from arbor_core import THOUGHTS, Chats, Conversation, Found, left_out

from .layout import TAGS, Layout, Span, kinds_of

EXACT = 6
"""Turns of a sequence that are rendered by themselves, whatever their kind."""
OPENING = re.compile(r"(<[\w:|]+>|\[[A-Z_]+\])\s*\Z")
"""A thought that a prompt opens."""


@dataclass(frozen=True)
class Turn:
    """A text that ends with an assistant's turn, control tokens in messages disguised.

    Args:
        begin: Where the answer begins; what precedes it is the prompt that an engine is sent.
        end: Where it ends, with the token that stops it where the template writes one.
        close: The template does not end the turn: the tokenizer's end token has to be added.
        found: The text's marks; None: they tell nothing.
    """

    text: str
    begin: int
    end: int
    close: bool
    found: Found | None


class Turns:
    """The turns of one conversation.

    Args:
        stops: Matches the tokens that may end a turn.
        closable: The tokenizer has an end token for turns that the template does not end.
        sampled: The turn is what a policy has sampled: a thought that the prompt opens is not closed for it.
    """

    def __init__(
        self,
        chats: Chats,
        conversation: Conversation,
        stops: re.Pattern[str] | None,
        closable: bool,
        *,
        sampled: bool = False,
    ) -> None:
        self.chats, self.conversation = chats, conversation
        self.stops, self.closable, self.sampled = stops, closable, sampled
        self.messages = conversation.messages
        self.tags = frozenset(TAGS.findall(str(chats.tokenizer.chat_template)))
        self.apart: set[Any] = set()
        """Kinds of turns that were found to be rewritten by what follows."""
        self.late = False

    def sequences(self, turns: Sequence[int]) -> list[tuple[Turn, dict[int, Span]]]:
        """Texts that hold all these turns, and where: one for the last turn with all earlier ones that it renders as
        they are rendered by themselves, and so on with what remains.

        Raises:
            ValueError: the template refuses the conversation, or its turns do not continue its generation prompt.
        """
        found: list[tuple[Turn, dict[int, Span]]] = []
        remaining = list(turns)
        while remaining:
            *earlier, last = remaining
            turn = self.turn(last)
            spans = {**self._placed(turn, earlier, last), last: (turn.begin, turn.end)}
            remaining = [index for index in remaining if index not in spans]
            found.append((turn, dict(sorted(spans.items()))))
        return found[::-1]

    def turn(self, index: int, *, marked: bool = True) -> Turn:
        """The message at an index, an assistant's, as the engine would have generated it.

        Args:
            marked: Look for the marks too.
        """
        after = self._text(index + 1, prompt=False)
        before = self._first_prompt(after) if index == 0 else self._text(index, prompt=True)
        if not after.startswith(before):
            return self._continued(index, before, after)
        found = self.chats.marked(self.conversation, after, index + 1, prompt=False) if marked else None
        return self._turn(index, before, after[len(before) :], found)

    def _turn(self, index: int, before: str, answer: str, found: Found | None) -> Turn:
        stops = [match.end() for match in self.stops.finditer(answer)] if self.stops else []
        # what follows the token that stops it, a line break, is never generated
        ended = bool(stops) and not answer[stops[-1] :].strip()
        if not ended and not self.closable:
            raise ValueError("the model's chat template does not end a turn, and its tokenizer has no end token")
        if self.stops and ended and len(stops) > 1 and not self.stops.sub("", answer[stops[-2] :]).strip():
            answer = self._without_end_of_text(index, before, answer, stops[-2])
            stops = [end for end in stops if end <= len(answer)]
        begin = len(before)
        end = begin + (stops[-1] if ended else len(answer))
        return Turn(before + answer, begin, end, close=not ended, found=found)

    def _without_end_of_text(self, index: int, before: str, answer: str, end: int) -> str:
        """An answer after which two tokens stop, without the second one where the template writes that at the end of
        a conversation only, and not when it goes on (Phi 3)."""
        following = self._text(index + 1, prompt=True)
        if following.startswith(before + answer[:end]) and not following.startswith(before + answer):
            return answer[:end]
        return answer

    def _text(self, count: int, *, prompt: bool) -> str:
        """The first messages as the template writes them."""
        try:
            return self.chats.render(self.conversation, count, prompt=prompt)
        except (TemplateError, TypeError, LookupError, AttributeError, RecursionError, ValueError) as error:
            raise ValueError(f"the model's chat template refuses it: {error}") from None

    def _first_prompt(self, after: str) -> str:
        """The generation prompt of a conversation that the assistant begins: as it follows a question, else that of an
        empty conversation.

        Args:
            after: The rendered first message.
        """
        found = self.chats.marked(self.conversation, after, 1, prompt=False)
        opening = self.chats.opening(self.conversation.tools)
        head = after[: found.at[0]] if found and found.at else ""
        for written in (opening, opening.rstrip(), OPENING.sub("", opening)):
            if written and (at := head.rfind(written)) >= 0:
                return after[:at] + opening
        try:
            before = self.chats.render(self.conversation, 0, prompt=True)
        except Exception:  # most templates look at the first message
            before = ""
        if not before:
            raise ValueError("messages[0] is an assistant's and answers nothing: put a message before it, or weight 0")
        return before

    def _continued(self, index: int, before: str, after: str) -> Turn:
        """A turn before which the template writes the conversation otherwise than in the prompt."""
        found = self._spliced(index, before, after)
        if found:
            return found
        if any(key in self.messages[index] for key in THOUGHTS):
            # the prompt rules thoughts out (Qwen3.5 without thinking): the rest can be learned
            other = self.conversation.without_thought(index)
            bare = Turns(self.chats, other, self.stops, self.closable, sampled=self.sampled)
            return replace(bare.turn(index), found=None)
        if index and not self.late and self._text(index, prompt=True) != before:
            self.late = True  # it writes the date, and midnight passed
            return self.turn(index)
        raise ValueError(
            "the model's chat template renders an assistant's turn otherwise than its generation prompt begins, so "
            f"what to learn is unclear: it prompts with {before[-40:]!r} and renders "
            f"{after[max(0, len(before) - 40) :][:80]!r}"
        )

    def _spliced(self, index: int, before: str, after: str) -> Turn | None:
        """A prompt, and what the template writes of the turn after what both have in common; None: it is unclear."""
        prompt = self.chats.marked(self.conversation, before, index, prompt=True) if index else Found(before, [], [])
        whole = self.chats.marked(self.conversation, after, index + 1, prompt=False)
        if not prompt or not whole or (index and not prompt.at):
            return None
        fields = self.conversation.marks.fields
        marks = list(zip(whole.at, whole.numbers, strict=True))
        own = min((at for at, number in marks if fields[number].message == index), default=len(after))
        starts = [at for at, number in marks if prompt.at and number == prompt.numbers[-1] and at <= own]
        if prompt.at and not starts:
            return None
        tail = before[prompt.at[-1] if prompt.at else 0 :]
        rest = after[starts[-1] if starts else 0 :]
        if rest.startswith(tail):
            added, kept, said = "", rest[len(tail) :], None
        elif thought := self._opened_thought(index, tail, rest, whole):
            added, kept, said = thought
        elif rest.startswith(bare := tail.rstrip()):
            added, kept, said = "", rest[len(bare) :].lstrip(), None
        else:
            return None
        begin, cut = len(before) + len(added), len(after) - len(kept)
        found = [*zip(prompt.at, prompt.numbers, strict=True)]
        found += [(len(before), number) for number in self._thought_marks(index, said)]
        found += [(at - cut + begin, number) for at, number in marks if at >= cut]
        text = before + added + kept
        joined = Found(text, [at for at, _ in found], [number for _, number in found])
        return self._turn(index, before, added + kept, joined)

    def _opened_thought(self, index: int, tail: str, rest: str, whole: Found) -> tuple[str, str, str | None] | None:
        """Where the prompt opens a thought and the template writes none: the message's thought with its end, what the
        template writes of the turn, and the key that has the thought."""
        opening = OPENING.search(tail)
        if not opening or not rest.startswith(tail[: opening.start()]) or rest.startswith(opening[1], opening.start()):
            return None
        closing = f"{opening[1][0]}/{opening[1][1:]}"
        if closing not in str(self.chats.tokenizer.chat_template):
            return None
        message, kept = self.messages[index], rest[opening.start() :]
        lost = {field.path for field in left_out(self.conversation, index, whole)}
        key = next((key for key in THOUGHTS if key in lost), None)
        thought, content = str(message[key]) if key else "", message["content"]
        if not key and "content" in lost and isinstance(content, str) and closing in content:
            key, kept = "content", kept.lstrip("\n")
            thought = content[: content.rindex(closing)].lstrip().removeprefix(opening[1])
        if not key and self.sampled:
            raise ValueError(
                f"its prompt opens a thought with {opening[1]} and the answer does not say how it went on: send it as "
                f"reasoning_content, content with {closing} in it, or tokens"
            )
        line = "\n" if "\n" in opening[0] else ""
        return f"{thought.strip(line or None)}{line}{closing}{line}{line}", kept, key

    def _thought_marks(self, index: int, key: str | None) -> list[int]:
        """The marks of what was taken for a thought: of its key, or those with which the content begins."""
        fields = self.conversation.marks.fields
        own = self.conversation.marks.of_message[index]
        return [at for at in own if fields[at].path == key and (fields[at].opens or key in THOUGHTS)]

    def _placed(self, turn: Turn, earlier: list[int], last: int) -> dict[int, Span]:
        """Where earlier turns are in the text of the last one; those that it rewrites are left out."""
        if len(earlier) < EXACT or turn.found is None:
            return dict(self._exactly(turn.text, earlier))
        kinds: dict[Any, list[int]] = {}
        for index, kind in kinds_of(earlier, self.messages[: last + 1], self.tags):
            if kind not in self.apart:
                kinds.setdefault(kind, []).append(index)
        layout = Layout(turn.found, self.conversation, self.stops)
        spans: dict[int, Span] = {}
        for kind, members in kinds.items():
            samples = sorted({members[0], members[-1]})
            sure = dict(self._exactly(turn.text, samples))
            spans |= sure
            others = members[1:-1]
            if not sure:
                self.apart.add(kind)
            elif rule := layout.rule(sure) if len(sure) == len(samples) else None:
                by_rule = {index: layout.span(index, rule) for index in others}
                spans |= {index: span for index, span in by_rule.items() if span}
                spans |= dict(self._exactly(turn.text, [index for index, span in by_rule.items() if not span]))
            else:
                spans |= dict(self._exactly(turn.text, others))
        return spans

    def _exactly(self, text: str, turns: Sequence[int]) -> Iterator[tuple[int, Span]]:
        """Those of some turns that a text holds as they are rendered by themselves."""
        for index in turns:
            turn = self.turn(index, marked=False)
            if not turn.close and text.startswith(turn.text[: turn.end]):
                yield index, (turn.begin, turn.end)
