"""How a batch is cut after the memory did not do."""

from __future__ import annotations

import numpy as np
import pytest
from arbor_grpo.training.micro_batches import Sizes, cut, tokens_of
from arbor_trl.budget import Budget
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
    found = Sizes(prompt, PROMPTS[prompt], completion)
    whole, half = (cut(found, Budget(4096, 128), most_rows, shared=shared, share=share) for share in (1.0, 0.5))
    assert sorted(row for part in half for row in part) == list(range(len(rows)))
    limit = max(tokens_of(found.of(np.array(part)), shared=shared) for part in whole) / 2
    assert all(len(part) == 1 or tokens_of(found.of(np.array(part)), shared=shared) <= limit for part in half)
