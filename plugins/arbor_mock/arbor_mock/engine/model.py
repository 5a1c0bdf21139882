"""The simulated model: what it answers, known before the first token is sent, and which weights it accepts."""

import codecs
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

_FAULTS = re.compile(r"\[mock:([^\]]*)\]")
FAULTS = (
    "delay_seconds",
    "token_seconds",
    "die_after_tokens",
    "fail_after_tokens",
    "hang",
    "full",
    "status",
    "logprob",
    "weights",
)


class BadFaultError(ValueError):
    """A `[mock: ...]` line that says nothing."""


@dataclass(frozen=True)
class Token:
    """One byte of an answer."""

    id: int
    text: str
    """What this byte adds to the text: nothing until a character is complete."""
    logprob: float
    top: dict[int, float]
    """Log-probabilities of the likeliest tokens, this one first."""


@dataclass(frozen=True)
class Sampling:
    """What shapes an answer."""

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    top: int = 0
    logprob: float | None = None


@dataclass
class Answer:
    """One choice."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    """Without the stop string."""
    finish_reason: str = "length"


def faults_in(text: str) -> dict[str, float]:
    """The faults that `[mock: key=value, ...]` in a prompt asks for, by key.

    Raises:
        BadFaultError: an unknown key, or no number.
    """
    faults: dict[str, float] = {}
    for line in _FAULTS.findall(text):
        for pair in line.split(","):
            key, _, value = (part.strip() for part in pair.partition("="))
            if key not in FAULTS:
                raise BadFaultError(f"'{key}' is none of {', '.join(FAULTS)}")
            try:
                faults[key] = float(value)
            except ValueError:
                raise BadFaultError(f"{key}={value}: expected a number") from None
    return faults


def answer(model: str, prompt: str, index: int, wanted: Sampling) -> Answer:
    """Choice number `index` of the answer of `model` to `prompt`."""
    numbers = random.Random(f"{model}/{wanted.seed}/{index}/{prompt}")
    result = Answer()
    decode = codecs.getincrementaldecoder("utf-8")("ignore").decode
    for byte in _bytes(prompt, numbers, wanted):
        if len(result.tokens) == wanted.max_tokens:
            return result
        logprob = wanted.logprob if wanted.logprob is not None else -numbers.random()
        piece = decode(bytes([byte]))
        result.tokens.append(Token(byte, piece, logprob, _top(byte, logprob, wanted.top)))
        result.text += piece
        if (end := _first_stop(result.text, wanted.stop)) is not None:
            result.text, result.finish_reason = result.text[:end], "stop"
            return result
    result.finish_reason = "stop"
    return result


def _bytes(prompt: str, numbers: random.Random, wanted: Sampling) -> Iterator[int]:
    """The words of the prompt, permuted unless greedy; again and again while the end must not come."""
    words = _FAULTS.sub(" ", prompt).split() or ["mock"]
    sent = 0
    while sent == 0 or sent < wanted.min_tokens or wanted.ignore_eos:
        if wanted.temperature > 0:
            numbers.shuffle(words)
        text = (" " if sent else "") + " ".join(words)
        sent += len(text.encode())
        yield from text.encode()


def _top(byte: int, logprob: float, count: int) -> dict[int, float]:
    """`count` likeliest tokens: the one that was sampled and its neighbours, each half as likely as the one before."""
    return {(byte + rank) % 256: logprob - rank * math.log(2) for rank in range(count)}


def _first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the earliest stop string begins; None while none is complete."""
    return min((position for stop in stops if (position := text.find(stop)) >= 0), default=None)


def spelled(token: int) -> str:
    """A token as OpenAI shows it: text, or the byte where it is none by itself."""
    return chr(token) if token < 128 else f"bytes:\\x{token:02x}"


def check_adapter(folder: Path) -> str:
    """Make sure that a directory can be a PEFT adapter's. Returns the SHA-256 of its tensors.

    Raises:
        ValueError, OSError: it cannot.
    """
    json.loads((folder / "adapter_config.json").read_bytes())
    return check_tensors(folder / "adapter_model.safetensors")


def check_tensors(path: Path) -> str:
    """Make sure that a file can be one of safetensors. Returns its SHA-256.

    Raises:
        ValueError: its header is cut off or is not JSON.
    """
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or len(raw) < 8 + length:
        raise ValueError(f"{path.name} is cut off at {len(raw)} bytes")
    json.loads(raw[8 : 8 + length])
    return sha256(raw).hexdigest()
