"""A growing set of whole numbers, mostly neighbours: what is held of them is where their spans begin and end."""

from __future__ import annotations

from bisect import bisect_right


class Spans:
    """Numbers from 0 on. A million in one row take as much memory as one does."""

    def __init__(self) -> None:
        self.edges: list[int] = []
        """The first number of a span and the one that follows its last, span by span, in order."""

    def __contains__(self, number: int) -> bool:
        return bisect_right(self.edges, number) % 2 == 1

    def add(self, number: int) -> None:
        """Take a number in; one that is there already changes nothing."""
        at = bisect_right(self.edges, number)
        if at % 2:
            return
        follows, precedes = self.edges[at - 1 : at] == [number], self.edges[at : at + 1] == [number + 1]
        self.edges[at - follows : at + precedes] = [number] * (not follows) + [number + 1] * (not precedes)
