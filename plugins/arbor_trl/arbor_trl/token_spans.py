"""Which tokens cover a part of a text.

Tokenizers say which characters each token covers, which takes them three times as long as the tokens do. Parts that end
with a control token and begin shortly after one are found without: control tokens are the same in text and tokens, and
what lies between one and the beginning of a part has the tokens that it has by itself, or is looked at by characters.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from arbor_core import Chats, ChatText

from .layout import Span

if TYPE_CHECKING:
    from tokenizers import Encoding

LONGEST_HEAD = 200
"""Characters between a control token and the beginning of a part."""
REMEMBERED = 10_000


class TokenSpans:
    """Tokens of texts, and of parts of them."""

    def __init__(self, chats: Chats) -> None:
        self.chats, self.tokenizer = chats, chats.tokenizer
        self.controls = frozenset(chats.tokens.values())
        self.heads: dict[str, list[int]] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts in which all control tokens count."""
        tokenizer: Any = self.tokenizer
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def by_controls(self, text: str, ids: list[int], spans: Sequence[Span]) -> list[Span] | None:
        """The tokens of parts of a text, by the control tokens around them; None: these do not tell.

        Args:
            text: All control tokens in it count.
            ids: Its tokens.
            spans: Parts, by characters.
        """
        if self.chats.control is None:
            return None
        found = list(self.chats.control.finditer(text))
        places = [place for place, token in enumerate(ids) if token in self.controls]
        if [self.chats.tokens[match[0]] for match in found] != [ids[place] for place in places]:
            return None
        starts, ends = [match.start() for match in found], [match.end() for match in found]
        tokens = []
        for begin, end in spans:
            before, stop = bisect_right(ends, begin) - 1, bisect_left(ends, end)
            if before + 1 < len(starts) and starts[before + 1] < begin:  # it begins within a control token
                return None
            at, head = (places[before] + 1, text[ends[before] : begin]) if before >= 0 else (0, text[:begin])
            first = at + len(self._head(head)) if len(head) <= LONGEST_HEAD else 0
            if stop == len(ends) or ends[stop] != end or not first or ids[at:first] != self._head(head):
                return None
            tokens.append((first, places[stop] + 1))
        return tokens

    def _head(self, text: str) -> list[int]:
        if text not in self.heads:
            if len(self.heads) >= REMEMBERED:
                self.heads.clear()
            (self.heads[text],) = self.ids([text])
        return self.heads[text]

    def by_offsets(self, chat: ChatText, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """The tokens of a text and of parts of it, by the characters that they cover."""
        extents: Sequence[Span]
        if chat.controls is None:
            (encoding,) = self.tokenizer([chat.text], add_special_tokens=False).encodings
            ids, extents = encoding.ids, _Extents(encoding)
        else:
            ids, extents = self.chats.encode(chat, offsets=True)
        cuts = [begin for begin, _ in spans if not _is_edge(extents, begin)]
        cuts += [end for _, end in spans if not (_is_edge(extents, end) or self._ends_in_control(ids, extents, end))]
        if cuts:
            ids, extents = self.chats.encode(chat, [edge for span in spans for edge in span], offsets=True)
        tokens = []
        for begin, end in spans:
            first = bisect_left(extents, begin, key=itemgetter(0))
            tokens.append((first, max(first, bisect_left(extents, end, key=itemgetter(0)))))
        return ids, tokens

    def _ends_in_control(self, ids: list[int], extents: Sequence[Span], end: int) -> bool:
        """Whether the last token that begins before a character is a control token: some take the spaces after them."""
        last = bisect_left(extents, end, key=itemgetter(0)) - 1
        return last >= 0 and ids[last] in self.controls


class _Extents(Sequence[Span]):
    """The characters that each token covers, looked up when needed: a list of them takes as long as tokenising."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding

    def __len__(self) -> int:
        return len(self.encoding)

    def __getitem__(self, index: Any) -> Any:
        return self.encoding.token_to_chars(index)


def _is_edge(extents: Sequence[Span], cut: int) -> bool:
    """Whether one token certainly ends at a character and the next begins there. Some tokenizers leave spaces out of
    the offsets, and do not say which neighbour holds them; the characters of one letter's several bytes overlap."""
    index = bisect_left(extents, cut, key=itemgetter(0))
    before = extents[index - 1][1] if index else 0
    return before == cut and (index == len(extents) or extents[index][0] == cut)
