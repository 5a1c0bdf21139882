"""From logits to tokens, for a whole batch at once, with every request's own parameters.

A row's token depends on that row alone: its random number comes from a hash of (seed, choice, position), and every
filter is a threshold on probabilities, so neither the other rows of the batch nor the order of ties matter.

Shapes: B rows, N those of them that are concerned, V vocabulary, K most probable tokens, 1 one number per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

WORD = (1 << 64) - 1
HEAD = 128
"""Most probable tokens that are looked at before a row's whole vocabulary is sorted for top_p, which takes 80 times as
long when it has 150,000 tokens."""


@dataclass(frozen=True)
class Sampling:
    """A request's parameters for the sampler. `top_k` 0, `top_p` 1 and `min_p` 0 mean off.

    `top_logprobs` is how many alternatives are reported with each token. `stop_ids` end a sequence and are kept from
    being sampled before `min_tokens`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    top_logprobs: int = 0
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()

    @cached_property
    def truncates(self) -> bool:
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    @cached_property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


class History:
    """Which tokens a sequence has seen and how often it produced them: what penalties are computed from."""

    def __init__(self, prompt: Sequence[int], produced: Sequence[int], vocabulary: int, device: torch.device) -> None:
        self.seen_V = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.counts_V = torch.zeros(vocabulary, device=device)
        self.seen_V[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True
        for token in produced:
            self.add(token)

    def add(self, token: int) -> None:
        self.seen_V[token] = True
        self.counts_V[token] += 1


class Row(Protocol):
    """A sequence as the sampler sees it."""

    history: History | None

    @property
    def sampling(self) -> Sampling: ...
    @property
    def choice(self) -> int: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def tokens(self) -> list[int]: ...


class Sampled(NamedTuple):
    """One row's next token. `logprob` is after temperature (1 for greedy), before penalties and truncation."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    finite: bool
    """False: the logits hold NaN or infinity, and nothing else here means anything."""


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1 - 2**-52] from three integers: SplitMix64 (Steele, Lea, Flood 2014), absorbed one by one."""
    state = 0
    for value in (seed, choice, position):
        state = (state + (value & WORD) + 0x9E3779B97F4A7C15) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return (state >> 12) * 2.0**-52


def sample(logits_BV: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Choose the next token of every row.

    Args:
        logits_BV: As the model gave them.
        rows: The sequences, in the same order.
    """
    logits_BV, device = logits_BV.float(), logits_BV.device
    temperature_B1 = torch.tensor([row.sampling.temperature or 1.0 for row in rows], device=device)[:, None]
    scaled_BV = logits_BV / temperature_B1
    normaliser_B1 = scaled_BV.logsumexp(-1, keepdim=True)
    # A logsumexp is finite exactly when no logit is NaN or +inf and not all of them are -inf.
    finite_B1 = normaliser_B1.isfinite()
    adjusted_BV = _adjusted(logits_BV, scaled_BV, rows)
    chosen_B = adjusted_BV.argmax(-1)
    drawing = [i for i, row in enumerate(rows) if row.sampling.temperature]
    if drawing:
        chosen_B[drawing] = _draw(adjusted_BV[drawing], [rows[i] for i in drawing])
    logprobs_B1 = scaled_BV.gather(1, chosen_B[:, None]) - normaliser_B1
    # One transfer instead of three: on a GPU each of them waits for the device.
    packed = torch.cat([chosen_B[:, None].double(), logprobs_B1.double(), finite_B1.double()], 1).tolist()
    tops: list[list[tuple[int, float]]] = [[] for _ in rows]
    if any(row.sampling.top_logprobs for row in rows):
        tops = _top(scaled_BV - normaliser_B1, rows)
    return [Sampled(int(token), lp, top, bool(ok)) for (token, lp, ok), top in zip(packed, tops, strict=True)]


def _adjusted(logits_BV: Tensor, scaled_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """`scaled_BV` with bias, penalties and forbidden ends applied to the rows that have them; a copy if any has."""
    wanted = [i for i, row in enumerate(rows) if row.sampling.logit_bias or row.sampling.penalises or early(row)]
    if not wanted:
        return scaled_BV
    changed_NV, changed = logits_BV[wanted], [rows[i] for i in wanted]
    for logits_V, row in zip(changed_NV, changed, strict=True):
        bias = row.sampling.logit_bias
        if bias:
            logits_V[list(bias)] += torch.tensor(list(bias.values()), device=logits_BV.device)
    penalised = [i for i, row in enumerate(changed) if row.sampling.penalises]
    if penalised:
        changed_NV[penalised] = _penalise(changed_NV[penalised], [changed[i] for i in penalised])
    for logits_V, row in zip(changed_NV, changed, strict=True):
        if early(row) and row.sampling.stop_ids:
            logits_V[list(row.sampling.stop_ids)] = float("-inf")
    result_BV = scaled_BV.clone()
    temperatures = [row.sampling.temperature or 1.0 for row in changed]
    result_BV[wanted] = changed_NV / torch.tensor(temperatures, device=logits_BV.device)[:, None]
    return result_BV


def early(row: Row) -> bool:
    """Whether a sequence may not end yet."""
    return len(row.tokens) < row.sampling.min_tokens


def _penalise(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Presence and frequency penalties as OpenAI defines them, repetition as CTRL does (Keskar et al. 2019)."""
    device = logits_BV.device
    for row in rows:
        if row.history is None:
            row.history = History(row.prompt, row.tokens, logits_BV.shape[-1], device)
    histories = [row.history for row in rows if row.history is not None]
    seen_BV = torch.stack([history.seen_V for history in histories])
    counts_BV = torch.stack([history.counts_V for history in histories])
    samplings = [row.sampling for row in rows]
    repetition_B1 = torch.tensor([sampling.repetition_penalty for sampling in samplings], device=device)[:, None]
    frequency_B1 = torch.tensor([sampling.frequency_penalty for sampling in samplings], device=device)[:, None]
    presence_B1 = torch.tensor([sampling.presence_penalty for sampling in samplings], device=device)[:, None]
    lowered_BV = torch.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    return torch.where(seen_BV, lowered_BV, logits_BV) - frequency_B1 * counts_BV - presence_B1 * (counts_BV > 0)


def _draw(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sample by inverting the distribution function at one number per row: token ids [B]."""
    probabilities_BV = logits_BV.softmax(-1)
    truncated = [i for i, row in enumerate(rows) if row.sampling.truncates]
    if truncated:
        probabilities_BV[truncated] = _truncate(probabilities_BV[truncated], [rows[i].sampling for i in truncated])
    points = [uniform(row.sampling.seed, row.choice, len(row.tokens)) for row in rows]
    # float64: over a vocabulary of 150,000 a float32 sum loses the small probabilities.
    heights_BV = probabilities_BV.double().cumsum(-1)
    target_B1 = torch.tensor(points, dtype=torch.float64, device=logits_BV.device)[:, None] * heights_BV[:, -1:]
    return torch.searchsorted(heights_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def _truncate(probabilities_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Zero what top_k, then top_p of the rest, then min_p leave out; ties stay together."""
    device, vocabulary = probabilities_BV.device, probabilities_BV.shape[-1]
    most = min(max(sampling.top_k for sampling in samplings), vocabulary)
    if most:
        ranks = [min(sampling.top_k or most, most) - 1 for sampling in samplings]
        ranks_B1 = torch.tensor(ranks, device=device)[:, None]
        floor_B1 = probabilities_BV.topk(most).values.gather(1, ranks_B1)
        floor_B1[[i for i, sampling in enumerate(samplings) if not sampling.top_k]] = 0
        probabilities_BV = probabilities_BV.where(probabilities_BV >= floor_B1, 0)
    nucleus = [i for i, sampling in enumerate(samplings) if sampling.top_p < 1]
    if nucleus:
        nucleus_NV = probabilities_BV[nucleus]
        shares_N1 = torch.tensor([samplings[i].top_p for i in nucleus], device=device)[:, None]
        mass_N1 = shares_N1 * nucleus_NV.sum(-1, keepdim=True)
        probabilities_BV[nucleus] = nucleus_NV.where(nucleus_NV >= _nucleus_floor(nucleus_NV, mass_N1), 0)
    least_B1 = torch.tensor([sampling.min_p for sampling in samplings], device=device)[:, None]
    return probabilities_BV.where(probabilities_BV >= least_B1 * probabilities_BV.amax(-1, keepdim=True), 0)


def _nucleus_floor(probabilities_BV: Tensor, mass_B1: Tensor) -> Tensor:
    """The smallest probability among the most probable tokens that together reach `mass_B1`: [B, 1]."""
    ordered_BK = probabilities_BV.topk(min(HEAD, probabilities_BV.shape[-1])).values
    floor_B1 = _reaching(ordered_BK, mass_B1)
    short = (ordered_BK.sum(-1) < mass_B1[:, 0]).nonzero()[:, 0]
    if len(short):
        floor_B1[short] = _reaching(probabilities_BV[short].sort(-1, descending=True).values, mass_B1[short])
    return floor_B1


def _reaching(ordered_BK: Tensor, mass_B1: Tensor) -> Tensor:
    """The probability, of descending ones, with which their sum reaches `mass_B1`: [B, 1]."""
    before_BK = ordered_BK.cumsum(-1) - ordered_BK
    kept_B1 = (before_BK < mass_B1).sum(-1, keepdim=True).clamp(min=1)
    return ordered_BK.gather(1, kept_B1 - 1)


def _top(logprobs_BV: Tensor, rows: Sequence[Row]) -> list[list[tuple[int, float]]]:
    """The most probable tokens of the rows that want them, best first."""
    asking = [i for i, row in enumerate(rows) if row.sampling.top_logprobs]
    most = min(max(rows[i].sampling.top_logprobs for i in asking), logprobs_BV.shape[-1])
    best = logprobs_BV[asking].topk(most)
    result: list[list[tuple[int, float]]] = [[] for _ in rows]
    for i, ids, values in zip(asking, best.indices.tolist(), best.values.tolist(), strict=True):
        result[i] = list(zip(ids, values, strict=True))[: rows[i].sampling.top_logprobs]
    return result
