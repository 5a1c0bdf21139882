"""Learning on command: a client says which text is counted next, and hears how likely it was before."""

from collections import Counter

import msgspec

from arbor_core import CommandRun

from . import InteractiveConfig
from .reinforce import save, serve_requests
from .train import loss


class Counts(msgspec.Struct):
    """All that training depends on: a function of the commands up to `step`."""

    step: int = 0
    tokens: int = 0
    pairs: dict[str, int] = {}

    def learn(self, text: str, smoothing: float) -> float:
        """Count a text. Returns its loss before that."""
        pairs = [first + second for first, second in zip("^" + text, text + "$", strict=True)]
        before = loss(pairs, Counter(self.pairs), smoothing)
        self.pairs = dict(Counter(self.pairs) + Counter(pairs))
        self.tokens += len(pairs)
        return before


def train(run: CommandRun[InteractiveConfig]) -> None:
    last = run.last_checkpoint()
    counts = msgspec.json.decode((last.dir / "learner.json").read_bytes(), type=Counts) if last else Counts()
    while run.desired() != "finish":
        serve_requests(run, counts)
        for command in run.commands(counts.step, wait=1.0):
            answer = {"loss": counts.learn(command.payload.decode(), run.config.smoothing)}
            counts.step = command.number
            run.result(command, msgspec.json.encode(answer))  # before any checkpoint that includes it
    run.finish(save(run, counts), counts.tokens)
