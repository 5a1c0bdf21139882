"""Which rows form which step: the same rows whatever the layout, and little padding."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
from arbor_sft import plan, train
from arbor_sft.plan import Layout, Plan
from arbor_trl.budget import Budget
from hypothesis import given
from hypothesis import strategies as st
from sft_jobs import config

BUDGET = Budget(tokens=4096, overhead=256)
LAYOUTS: tuple[Layout, ...] = ("padded", "sorted", "packed")
lengths_of_rows = st.lists(st.integers(1, 1000), min_size=1, max_size=60)


def make(lengths: list[int], layout: Layout = "sorted", **changes: object) -> Plan:
    sizes: dict[str, object] = {
        "batch_size": 16,
        "epochs": 2,
        "max_steps": None,
        "seed": 1,
        "micro_batch_size": None,
        "budget": BUDGET,
    }
    return plan.make(lengths, layout=layout, **{**sizes, **changes})  # type: ignore[arg-type]


@given(lengths_of_rows, st.integers(1, 20), st.sampled_from(LAYOUTS), st.one_of(st.none(), st.integers(1, 9)))
def test_each_epoch_has_every_row_once(
    lengths: list[int], batch_size: int, layout: Layout, micro_batch_size: int | None
) -> None:
    made = make(lengths, layout, batch_size=batch_size, micro_batch_size=micro_batch_size)
    steps = [sorted(row for rows in step for row in rows) for step in made.steps]
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(len(lengths)))
        assert all(len(rows) == batch_size for rows in epoch[:-1])
    assert made.epoch_ends == {half, 2 * half}
    assert {len(step) for step in made.steps} == {made.parts}
    assert made.tokens == 2 * sum(lengths)
    if micro_batch_size:
        assert max(map(len, made.micro_batches)) <= micro_batch_size
    padded = make(lengths, "padded", batch_size=batch_size)
    assert steps == [sorted(row for rows in step for row in rows) for step in padded.steps]


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8), st.integers(1, 8))
def test_no_contiguous_cut_has_less_padding(lengths: list[int], parts: int) -> None:
    parts = min(parts, len(lengths))
    rows = plan.cut(list(range(len(lengths))), lengths, parts, "sorted")
    order = sorted(lengths)
    edges = ([0, *inner, len(order)] for inner in combinations(range(1, len(order)), parts - 1))
    best = min(sum((b - a) * order[b - 1] for a, b in pairwise(e)) for e in edges)
    assert sum(plan.size(part, lengths, "sorted") for part in rows) == best


def test_sizes_stay_within_the_budget() -> None:
    draw = random.Random(0)
    lengths = [min(1000, max(20, int(draw.lognormvariate(5, 0.9)))) for _ in range(500)]
    made = make(lengths, batch_size=64)
    assert max(plan.size(rows, lengths, "sorted") for rows in made.micro_batches) <= BUDGET.tokens
    padded = sum(plan.size(rows, lengths, "sorted") for rows in made.micro_batches)
    assert padded < 1.25 * made.tokens


@given(lengths_of_rows, st.integers(2, 20), st.sampled_from(LAYOUTS), st.one_of(st.none(), st.integers(1, 9)))
def test_row_88_half_the_share_halves_the_largest_micro_batch(
    lengths: list[int], batch_size: int, layout: Layout, micro_batch_size: int | None
) -> None:
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    whole, half = make(lengths, layout, **sizes), make(lengths, layout, **sizes, share=0.5)
    for before, after in zip(whole.steps, half.steps, strict=True):
        assert sorted(row for rows in before for row in rows) == sorted(row for rows in after for row in rows)
    most_rows = max(map(len, half.micro_batches))
    if micro_batch_size:
        assert most_rows <= max(1, micro_batch_size // 2)
        return
    largest, now = (max(plan.size(rows, lengths, layout) for rows in made.micro_batches) for made in (whole, half))
    assert now <= largest / 2 or most_rows == 1


def test_rows_of_one_length_stay_together() -> None:
    assert make([40] * 64).parts == 1


def test_ranks_share_each_step() -> None:
    made = make([30] * 33, batch_size=16, epochs=1, ranks=2)
    assert made.parts == 2
    assert [len(rows) for rows in made.steps[-1]] == [1, 0]


def test_seed_and_limit() -> None:
    lengths = list(range(1, 41))
    assert make(lengths).steps == make(lengths).steps
    assert make(lengths).steps != make(lengths, seed=2).steps
    short = make(lengths, max_steps=4)
    assert short.steps == make(lengths).steps[:4]
    assert short.epoch_ends == {3}


@given(lengths_of_rows, st.sampled_from(LAYOUTS))
def test_evaluation_sees_every_row_once(lengths: list[int], layout: Layout) -> None:
    found = plan.evaluation(lengths, layout, 8, BUDGET)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or plan.size(rows, lengths, layout) <= BUDGET.tokens for rows in found)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size"),
    [(10, 10, 1), (33, 4, 1), (34, 3, 1), (1000, 3, 2), (8334, 2, 17), (200_000, 1, 256)],
)
def test_auto(rows: int, epochs: int, batch_size: int) -> None:
    made = config({})
    assert (plan.n_epochs(made, rows), plan.batch_size(made, rows)) == (epochs, batch_size)
    assert train.learning_rate(made) == train.ADAPTER_RATE
    full = config({"lora": None, "learning_rate_multiplier": 2})
    assert train.learning_rate(full) == 2 * train.FULL_RATE
