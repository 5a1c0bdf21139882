"""One sequence being generated: its tokens, its text, why it ends, and what it reports when."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from arbor_core.engine import ApiError
from arbor_transformers.errors import numerical
from arbor_transformers.model.lora import Adapter

from .detokenizer import Detokenizer, StopStrings
from .sampler import History, Sampled, Sampling


class Token(NamedTuple):
    """A generated token as it is reported. `offset` is where its text begins in the choice's text, in characters."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int


class Delta(NamedTuple):
    """What a sequence has produced since its last delta. `finish` or `error` end it."""

    choice: int
    text: str
    tokens: list[Token]
    finish: str | None = None
    error: ApiError | None = None
    version: int | None = None
    """The oldest policy version that sampled any of the sequence."""


class Sink(Protocol):
    """Where a request's deltas go."""

    def put(self, delta: Delta) -> None: ...


@dataclass(eq=False)
class Generation:
    """One sequence being generated: a choice of a request.

    Args:
        prompt: Token ids.
        sampling: How to choose tokens.
        choice: Its index in the answer.
        max_tokens: Tokens after which it ends.
        adapter: Whose weights it runs on, to its end.
        sink: Receives its deltas.
        streams: Whether it reports as it goes or once at the end.
        text: Makes its text.
        stops: Ends it.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    choice: int
    max_tokens: int
    adapter: Adapter | None
    sink: Sink
    streams: bool
    text: Detokenizer
    stops: StopStrings
    tokens: list[int] = field(default_factory=list)
    history: History | None = None
    cancelled: bool = False
    version: int | None = None
    """That of the weights when it entered for the first time; newer ones may have gone on with it."""
    _text: str = ""
    _unreported: list[Token] = field(default_factory=list)

    @property
    def ids(self) -> tuple[int, ...]:
        """All of its tokens so far."""
        return (*self.prompt, *self.tokens)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def take(self, sampled: Sampled) -> Delta | None:
        """Append a token; the delta to report now, if any."""
        if not sampled.finite:
            return Delta(self.choice, "", [], error=numerical())
        self._unreported.append(Token(sampled.token, sampled.logprob, sampled.top, self.text.length))
        self.tokens.append(sampled.token)
        if self.history is not None:
            self.history.add(sampled.token)
        finish = self._extend(sampled.token)
        if finish is None and not (self.streams and self._text):
            return None
        delta = Delta(self.choice, self._text, self._unreported, finish, version=self.version)
        self._text, self._unreported = "", []
        return delta

    def _extend(self, token: int) -> str | None:
        """Add the token's text; why the sequence ends with it, if it does."""
        if token in self.sampling.stop_ids:
            self._text += self.stops.add(self.text.flush(), armed=False)
            return "stop"
        last = len(self.tokens) >= self.max_tokens
        text = self.text.add(token) + (self.text.flush() if last else "")
        self._text += self.stops.add(text, armed=len(self.tokens) >= self.sampling.min_tokens)
        if self.stops.stopped:
            return "stop"
        if not last:
            return None
        self._text += self.stops.flush()
        return "length"
