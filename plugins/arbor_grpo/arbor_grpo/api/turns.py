"""Completions that go on from one another, token by token, as sequences.

A group may have many thousands of completions, and the server does nothing else meanwhile: the time that this takes
grows with their tokens, not with the square of their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import groupby

from msgspec import Struct, field

from arbor_core import Completion, Rollout
from arbor_core.http import name_of

from .requests import Reward

TOKEN = 4
"""Bytes of a token's id, and of a log-probability."""
Entry = tuple[int, Reward, Completion]
"""Place in the request, its reward, and what was sampled."""


class Turns(Struct):
    """Turns that are one sequence: prompt, answer, what the environment wrote, answer, and so on."""

    prompt: bytes
    entries: list[Entry] = []
    completion: bytearray = field(default_factory=bytearray)
    logprobs: bytearray = field(default_factory=bytearray)
    mask: bytearray = field(default_factory=bytearray)

    def extend(self, entry: Entry) -> None:
        """Go on with a turn whose prompt begins with all of this."""
        _, _, turn = entry
        between = turn.prompt[len(self.prompt) + len(self.completion) :]
        self.completion += between + turn.tokens
        self.logprobs += bytes(len(between)) + turn.logprobs
        self.mask += bytes(len(between) // TOKEN) + b"\x01" * (len(turn.tokens) // TOKEN)
        self.entries.append(entry)

    def rollout(self, trajectory: int, reward: float | None, advantage: float | None) -> Rollout:
        completions = [completion for _, _, completion in self.entries]
        return Rollout(
            trajectory=trajectory,
            reward=reward,
            advantage=advantage,
            prompt=self.prompt,
            completion=bytes(self.completion),
            logprobs=bytes(self.logprobs),
            mask=bytes(self.mask) if 0 in self.mask else b"",
            truncated=completions[-1].finish == "length",
            completions=tuple(name_of(one.id, one.index) for one in completions),
        )


class Ends:
    """Where the sequences of some entries may end, and the sequences that do.

    The ends form a tree: above each is the longest other one that it begins with. Sorted, what a text begins with comes
    before it, so that one pass finds all of it.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        ends = {turn.prompt + turn.tokens for _, _, turn in entries}
        self.above: dict[bytes, bytes | None] = {}
        self.waiting: dict[bytes, list[tuple[int, Turns]]] = defaultdict(list)
        """The sequences that end there, with their numbers."""
        open_: list[bytes] = []
        for text in sorted(ends.union(turn.prompt for _, _, turn in entries)):
            while open_ and not text.startswith(open_[-1]):
                open_.pop()
            self.above[text] = open_[-1] if open_ else None
            if text in ends:
                open_.append(text)

    def add(self, number: int, turns: Turns) -> None:
        """A sequence that may be gone on from by longer prompts."""
        _, _, last = turns.entries[-1]
        heappush(self.waiting[last.prompt + last.tokens], (number, turns))

    def take(self, prompt: bytes) -> tuple[int, Turns] | None:
        """The longest sequence that a prompt begins with, of equal ones the first. Prompts come by length."""
        passed, end = [], prompt
        while not self.waiting.get(end):
            passed.append(end)
            if (above := self.above[end]) is None:
                break
            end = above
        found = self.waiting.get(end)
        for text in passed:  # no sequence will end between here and there any more: its turns had shorter prompts
            self.above[text] = end if found else None
        return heappop(found) if found else None


def sequences(entries: Sequence[Entry]) -> list[Turns]:
    """The sequences that some entries form. Each entry goes on from the longest that its prompt begins with, if nothing
    else did; shorter prompts come first."""
    ends, found = Ends(entries), list[Turns]()
    for _, alike in groupby(sorted(entries, key=_length), key=_length):
        grown = []
        for entry in alike:
            number, turns = ends.take(entry[2].prompt) or (len(found), Turns(entry[2].prompt))
            if number == len(found):
                found.append(turns)
            turns.extend(entry)
            grown.append((number, turns))
        for number, turns in grown:  # later: an empty answer to the same prompt is nothing to go on from
            ends.add(number, turns)
    return found


def _length(entry: Entry) -> int:
    return len(entry[2].prompt)
