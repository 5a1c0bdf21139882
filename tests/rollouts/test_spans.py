"""A set of whole numbers that takes as much memory as it has gaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arbor_core.rollouts.credits import Spans


@given(numbers=st.lists(st.integers(0, 30)))
def test_it_holds_what_was_added_and_nothing_else(numbers: list[int]) -> None:
    spans = Spans()
    for number in numbers:
        spans.add(number)
    assert {number for number in range(-1, 33) if number in spans} == set(numbers)
    assert spans.edges == sorted(set(spans.edges)), "neighbours are one span"


def test_a_row_takes_two_numbers_however_it_came() -> None:
    spans = Spans()
    for number in [*range(0, 10_000, 2), *range(9_999, 0, -2)]:
        spans.add(number)
    assert spans.edges == [0, 10_000]
