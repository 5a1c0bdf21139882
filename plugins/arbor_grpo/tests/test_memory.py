"""How a batch is cut after it did not fit in memory."""

from __future__ import annotations

import numpy as np
import pytest
from arbor_trl.budget import Budget
from arbor_trl.partition import Sizes, cut
from hypothesis import given
from hypothesis import strategies as st

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), min_size=1, max_size=40)
PROMPTS = np.array([5, 20, 80, 300])


@pytest.mark.parametrize("shared", [False, True])
@given(rows=ROWS, most_rows=st.none() | st.integers(1, 9))
def test_row_88_half_the_share_halves_the_largest_micro_batch(
    shared: bool, rows: list[tuple[int, int]], most_rows: int | None
) -> None:
    prompt, completion = np.array(rows).T
    found = Sizes(prompt, PROMPTS[prompt], completion + 1)
    whole, half = (cut(found, Budget(4096, 128), most_rows, shared=shared, share=share) for share in (1.0, 0.5))
    assert sorted(row for part in half for row in part) == list(range(len(rows)))
    limit = max(found.take(part).padded_tokens(shared=shared) for part in whole) / 2
    assert all(len(part) == 1 or found.take(part).padded_tokens(shared=shared) <= limit for part in half)
