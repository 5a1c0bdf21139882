"""From logits to tokens, for a whole batch at once, with every request's own parameters.

A row's token depends on that row alone: its random number comes from a hash of (seed, choice, position), and every
filter is a threshold on probabilities, so neither the other rows of the batch nor the order of ties matter.
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
    """What a request asks of the sampler. `top_k` 0, `top_p` 1 and `min_p` 0 mean off.

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
    """Which tokens a sequence has seen and how often it produced them: what penalties are made of. Two [V] vectors."""

    def __init__(self, prompt: Sequence[int], produced: Sequence[int], vocabulary: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocabulary, device=device)
        self.seen[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True
        for token in produced:
            self.add(token)

    def add(self, token: int) -> None:
        self.seen[token] = True
        self.counts[token] += 1


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


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Choose the next token of every row.

    Args:
        logits: [rows, vocabulary], as the model gave them.
        rows: The sequences, in the same order.
    """
    logits, device = logits.float(), logits.device
    temperature = torch.tensor([row.sampling.temperature or 1.0 for row in rows], device=device)[:, None]
    scaled = logits / temperature
    normaliser = scaled.logsumexp(-1, keepdim=True)
    # A logsumexp is finite exactly when no logit is NaN or +inf and not all of them are -inf.
    finite = normaliser.isfinite()
    wanted = _adjusted(logits, scaled, rows)
    chosen = wanted.argmax(-1)
    drawing = [i for i, row in enumerate(rows) if row.sampling.temperature]
    if drawing:
        chosen[drawing] = _draw(wanted[drawing], [rows[i] for i in drawing])
    logprobs = scaled.gather(1, chosen[:, None]) - normaliser
    # One transfer instead of three: on a GPU each of them waits for the device.
    packed = torch.cat([chosen[:, None].double(), logprobs.double(), finite.double()], 1).tolist()
    tops = _top(scaled - normaliser, rows) if any(row.sampling.top_logprobs for row in rows) else [[] for _ in rows]
    return [Sampled(int(token), lp, top, bool(ok)) for (token, lp, ok), top in zip(packed, tops, strict=True)]


def _adjusted(logits: Tensor, scaled: Tensor, rows: Sequence[Row]) -> Tensor:
    """`scaled` with bias, penalties and forbidden ends applied to the rows that have them; a copy if any has."""
    wanted = [i for i, row in enumerate(rows) if row.sampling.logit_bias or row.sampling.penalises or early(row)]
    if not wanted:
        return scaled
    some, asking = logits[wanted], [rows[i] for i in wanted]
    for logit, row in zip(some, asking, strict=True):
        bias = row.sampling.logit_bias
        if bias:
            logit[list(bias)] += torch.tensor(list(bias.values()), device=logits.device)
    penalised = [i for i, row in enumerate(asking) if row.sampling.penalises]
    if penalised:
        some[penalised] = _penalise(some[penalised], [asking[i] for i in penalised])
    for logit, row in zip(some, asking, strict=True):
        if early(row) and row.sampling.stop_ids:
            logit[list(row.sampling.stop_ids)] = float("-inf")
    result = scaled.clone()
    temperatures = [row.sampling.temperature or 1.0 for row in asking]
    result[wanted] = some / torch.tensor(temperatures, device=logits.device)[:, None]
    return result


def early(row: Row) -> bool:
    """Whether a sequence may not end yet."""
    return len(row.tokens) < row.sampling.min_tokens


def _penalise(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Presence and frequency penalties as OpenAI defines them, repetition as CTRL does (Keskar et al. 2019)."""
    device = logits.device
    for row in rows:
        if row.history is None:
            row.history = History(row.prompt, row.tokens, logits.shape[-1], device)
    histories = [row.history for row in rows if row.history is not None]
    seen = torch.stack([history.seen for history in histories])
    counts = torch.stack([history.counts for history in histories])
    asks = [row.sampling for row in rows]
    repetition = torch.tensor([ask.repetition_penalty for ask in asks], device=device)[:, None]
    frequency = torch.tensor([ask.frequency_penalty for ask in asks], device=device)[:, None]
    presence = torch.tensor([ask.presence_penalty for ask in asks], device=device)[:, None]
    lowered = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(seen, lowered, logits) - frequency * counts - presence * (counts > 0)


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sample by inverting the distribution function at one number per row. [rows, V] -> [rows]."""
    probabilities = logits.softmax(-1)
    truncated = [i for i, row in enumerate(rows) if row.sampling.truncates]
    if truncated:
        probabilities[truncated] = _truncate(probabilities[truncated], [rows[i].sampling for i in truncated])
    points = [uniform(row.sampling.seed, row.choice, len(row.tokens)) for row in rows]
    # float64: over a vocabulary of 150,000 a float32 sum loses the small probabilities.
    heights = probabilities.double().cumsum(-1)
    target = torch.tensor(points, dtype=torch.float64, device=logits.device)[:, None] * heights[:, -1:]
    return torch.searchsorted(heights, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _truncate(probabilities: Tensor, asks: Sequence[Sampling]) -> Tensor:
    """Zero what top_k, then top_p of the rest, then min_p leave out. [rows, V] -> [rows, V]; ties stay together."""
    device, vocabulary = probabilities.device, probabilities.shape[-1]
    most = min(max(ask.top_k for ask in asks), vocabulary)
    if most:
        ranks = torch.tensor([min(ask.top_k or most, most) - 1 for ask in asks], device=device)[:, None]
        floor = probabilities.topk(most).values.gather(1, ranks)
        floor[[i for i, ask in enumerate(asks) if not ask.top_k]] = 0
        probabilities = probabilities.where(probabilities >= floor, 0)
    nucleus = [i for i, ask in enumerate(asks) if ask.top_p < 1]
    if nucleus:
        part = probabilities[nucleus]
        mass = torch.tensor([asks[i].top_p for i in nucleus], device=device)[:, None] * part.sum(-1, keepdim=True)
        probabilities[nucleus] = part.where(part >= _nucleus_floor(part, mass), 0)
    least = torch.tensor([ask.min_p for ask in asks], device=device)[:, None]
    return probabilities.where(probabilities >= least * probabilities.amax(-1, keepdim=True), 0)


def _nucleus_floor(probabilities: Tensor, mass: Tensor) -> Tensor:
    """The smallest probability among the most probable tokens that together reach `mass` [rows, 1]."""
    ordered = probabilities.topk(min(HEAD, probabilities.shape[-1])).values
    floor = _reaching(ordered, mass)
    short = (ordered.sum(-1) < mass[:, 0]).nonzero()[:, 0]
    if len(short):
        floor[short] = _reaching(probabilities[short].sort(-1, descending=True).values, mass[short])
    return floor


def _reaching(ordered: Tensor, mass: Tensor) -> Tensor:
    """Where descending probabilities [rows, n] have summed up to `mass`: the one that does it, [rows, 1]."""
    before = ordered.cumsum(-1) - ordered
    kept = (before < mass).sum(-1, keepdim=True).clamp(min=1)
    return ordered.gather(1, kept - 1)


def _top(logprobs: Tensor, rows: Sequence[Row]) -> list[list[tuple[int, float]]]:
    """The most probable tokens of the rows that want them, best first."""
    asking = [i for i, row in enumerate(rows) if row.sampling.top_logprobs]
    most = min(max(rows[i].sampling.top_logprobs for i in asking), logprobs.shape[-1])
    best = logprobs[asking].topk(most)
    result: list[list[tuple[int, float]]] = [[] for _ in rows]
    for i, ids, values in zip(asking, best.indices.tolist(), best.values.tolist(), strict=True):
        result[i] = list(zip(ids, values, strict=True))[: rows[i].sampling.top_logprobs]
    return result
