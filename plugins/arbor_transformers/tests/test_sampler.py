"""The sampler against plain references, one row at a time."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from arbor_transformers.generation.sampler import History, Sampling, sample, uniform
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

VOCABULARY = 50


@dataclass
class One:
    """A row."""

    sampling: Sampling
    choice: int = 0
    prompt: tuple[int, ...] = (1, 2, 3)
    tokens: list[int] = field(default_factory=list)
    history: History | None = None


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def draws(logits: torch.Tensor, count: int, **parameters: Any) -> Counter[int]:
    rows = [One(Sampling(seed=seed, **parameters)) for seed in range(count)]
    return Counter(one.token for one in sample(logits.expand(count, -1), rows))


def test_frequencies_follow_the_distribution() -> None:
    logits = logits_of(0)
    seen = draws(logits, 20000, temperature=0.7)
    expected = (logits[0] / 0.7).softmax(-1) * 20000
    chi2 = sum((seen[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected) if e > 5)
    freedom = int((expected > 5).sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.05},
        {"top_k": 500},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_truncation_keeps_what_the_reference_keeps(parameters: dict[str, Any], seed: int) -> None:
    logits = logits_of(seed)
    kept = logits.clone()
    ids = torch.tensor([[0]])
    if "top_k" in parameters:
        kept = TopKLogitsWarper(parameters["top_k"])(ids, kept)
    if "top_p" in parameters:
        kept = TopPLogitsWarper(parameters["top_p"])(ids, kept)
    if "min_p" in parameters:
        kept = MinPLogitsWarper(parameters["min_p"])(ids, kept)
    probabilities = kept.softmax(-1)[0]
    seen = draws(logits, 4000, **parameters)
    assert set(seen) <= {i for i, p in enumerate(probabilities) if p > 0}
    assert all(seen[i] for i, p in enumerate(probabilities) if p > 0.01)
    top = int(probabilities.argmax())
    assert seen[top] / 4000 == pytest.approx(float(probabilities[top]), abs=0.04)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = logits_of(1, 6)
    asks = [
        Sampling(temperature=0),
        Sampling(seed=1),
        Sampling(seed=2, top_k=3),
        Sampling(seed=3, top_p=0.5, temperature=1.5),
        Sampling(seed=4, min_p=0.3, top_k=20),
        Sampling(seed=5, presence_penalty=2.0, repetition_penalty=1.3, top_p=0.9),
    ]
    together = sample(logits, [One(ask) for ask in asks])
    alone = [sample(logits[i : i + 1], [One(ask)])[0] for i, ask in enumerate(asks)]
    assert together == alone


def test_penalties_and_bias_against_a_plain_reference() -> None:
    logits, produced, prompt = logits_of(2)[0], [7, 7, 9], (1, 7)
    ask = Sampling(
        temperature=0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.4,
        logit_bias={11: 2.0, 7: -1.0},
        top_logprobs=1,
    )
    expected = logits.tolist()
    expected[11] += 2.0
    expected[7] -= 1.0
    for token in {*prompt, *produced}:
        expected[token] = expected[token] / 1.4 if expected[token] > 0 else expected[token] * 1.4
    for token in set(produced):
        expected[token] -= 0.5 + 0.25 * produced.count(token)
    chosen = max(range(VOCABULARY), key=expected.__getitem__)
    row = One(ask, prompt=prompt, tokens=list(produced))
    one = sample(logits[None], [row])[0]
    assert one.token == chosen
    # What is reported is the model's own distribution, penalties or not.
    assert one.logprob == pytest.approx(float(logits.log_softmax(-1)[chosen]), abs=1e-5)
    assert one.top[0][0] == int(logits.argmax())
    assert row.history is not None and row.history.counts_V[7] == 2


def test_history_grows_as_it_is_rebuilt() -> None:
    grown = History((1, 2), (), VOCABULARY, torch.device("cpu"))
    for token in (4, 4, 5):
        grown.add(token)
    rebuilt = History((1, 2), (4, 4, 5), VOCABULARY, torch.device("cpu"))
    assert torch.equal(grown.counts_V, rebuilt.counts_V) and torch.equal(grown.seen_V, rebuilt.seen_V)


def test_logprobs_are_after_temperature_and_before_truncation() -> None:
    logits = logits_of(3)
    one = sample(logits, [One(Sampling(temperature=0.5, top_k=1, top_logprobs=3))])[0]
    expected = (logits[0] / 0.5).log_softmax(-1)
    assert one.logprob == pytest.approx(float(expected[one.token]), abs=1e-5)
    assert [token for token, _ in one.top] == expected.topk(3).indices.tolist()


def test_ends_are_not_sampled_too_early() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5] = 50
    ask = Sampling(seed=0, min_tokens=2, stop_ids=frozenset({5}))
    assert sample(logits, [One(ask, tokens=[1])])[0].token != 5
    assert sample(logits, [One(ask, tokens=[1, 1])])[0].token == 5


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_row_134_a_poisoned_row_is_told_apart(poison: float) -> None:
    logits = logits_of(4, 3)
    logits[1, 8] = poison
    rows = [One(Sampling(seed=1)) for _ in range(3)]
    results = sample(logits, rows)
    assert [one.finite for one in results] == [True, False, True]
    assert results[0] == sample(logits[:1], rows[:1])[0]


def test_minus_infinity_is_a_probability_of_zero() -> None:
    logits = torch.full((1, VOCABULARY), float("-inf"))
    logits[0, 3] = 0
    one = sample(logits, [One(Sampling(seed=9, top_logprobs=2))])[0]
    assert one.finite and one.token == 3 and one.top[1][1] == float("-inf")


def test_uniform_is_even_and_depends_on_every_argument() -> None:
    values = [uniform(seed, choice, position) for seed in range(20) for choice in range(20) for position in range(20)]
    assert len(set(values)) == 8000
    assert all(0 <= value < 1 for value in values)
    assert sum(values) / 8000 == pytest.approx(0.5, abs=0.02)
    assert uniform(-1, 0, 0) == uniform(-1, 0, 0) != uniform(1, 0, 0)
