"""The rate of each step, and gradients that are 0."""

from __future__ import annotations

import pytest
import torch
from arbor_trl.steps import is_zero, rate_share


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "shares"),
    [
        ("constant", 3, 4, [1, 1, 1, 1]),
        ("constant_with_warmup", 4, 6, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("linear", 0, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, 6, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 1, 1, [1]),
        ("linear", 3, 3, [1 / 3, 2 / 3, 1]),
        ("cosine", 0, 2, [1, 1 / 2]),
        ("cosine", 1, 4, [1, 1, 3 / 4, 1 / 4]),
    ],
)
def test_rates(schedule: str, warmup: int, total: int, shares: list[float]) -> None:
    found = [rate_share(step, schedule=schedule, warmup=warmup, total=total) for step in range(total)]
    assert found == pytest.approx(shares)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_no_step_has_a_rate_of_0(schedule: str) -> None:
    for total in range(1, 20):
        for warmup in range(total + 2):
            rates = [rate_share(step, schedule=schedule, warmup=warmup, total=total) for step in range(total)]
            assert min(rates) > 0
            assert max(rates) <= 1


def test_a_gradient_of_zeros() -> None:
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    assert is_zero([first, second])
    first.grad = torch.tensor([0.0, -0.0])
    assert is_zero([first, second])
    second.grad = torch.tensor([0.0, 1e-30])
    assert not is_zero([first, second])
    second.grad = torch.tensor([0.0, torch.nan])
    assert not is_zero([first, second])
