"""OpenAI's shapes, as the simulated engine reads and writes them.

The server has checked most of a request already. The structs are this engine's own all the same: it validates what it
uses, and leaves out what a simulation cannot honour.
"""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from arbor_core.engine import NO_RETRY, ApiError

from .model import Answer, Sampling, Token, spelled

VOCABULARY = 256
MINUS_INFINITY = -9999.0
"""What OpenAI writes for a log-probability that JSON cannot hold."""


class StreamOptions(Struct):
    include_usage: bool = False


class Body(Struct, kw_only=True):
    """What chat and plain completions share. Parameters that shape a distribution are not listed: there is none."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    stop: str | list[str] | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    def most(self) -> int | None:
        """The request's limit of tokens."""
        return self.max_tokens

    def top(self) -> int | None:
        """How many alternatives each token has in the answer; None: no log-probabilities at all."""
        raise NotImplementedError

    def sampling(self, most: int, logprob: float | None) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=most,
            seed=self.seed or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            stop=tuple(stop),
            min_tokens=self.min_tokens or 0,
            ignore_eos=self.ignore_eos,
            top=self.top() or 0,
            logprob=logprob,
        )


class ChatBody(Body, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self) -> list[tuple[str, bytes]]:
        """What is answered (the last message) and what is read (all of them, with their roles)."""
        lines = [f"{message.get('role')}: {_content(message)}\n" for message in self.messages]
        return [(_content(self.messages[-1]), "".join(lines).encode())]


class CompletionBody(Body, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None

    def most(self) -> int | None:
        return self.max_tokens or 16

    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[tuple[str, bytes]]:
        one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        tokens = [_tokens(prompt) for prompt in ([self.prompt] if one else self.prompt)]
        return [(prompt.decode(errors="replace"), prompt) for prompt in tokens]


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def _tokens(prompt: Any) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode()
    for token in prompt:
        if not isinstance(token, int) or not 0 <= token < VOCABULARY:
            message = f"Invalid 'prompt': {token!r} is no token of this model; expected 0 to {VOCABULARY - 1}."
            raise ApiError(400, message, "invalid_value", "prompt")
    return bytes(prompt)


class LoadBody(Struct):
    """Of the route that loads an adapter."""

    lora_name: str
    lora_path: str
    sent: dict[str, Any] | None = None


class UpdateBody(Struct):
    """Of the route that replaces the weights."""

    path: str
    version: int
    sent: dict[str, Any] | None = None


class Writer:
    """Builds one request's answer, whole or in chunks. Subclasses know the shapes of one route."""

    whole = chunk = prefix = ""

    def __init__(self, body: Body, answers: Sequence[Answer], prompts: Sequence[bytes], per_prompt: int) -> None:
        self.body, self.answers, self.prompts, self.per_prompt = body, answers, prompts, per_prompt
        self.version: int | None = None
        """Policy version that answers."""
        self.announced = False
        """Whether the ids of the prompts were sent."""
        self.shared = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def response(self) -> bytes:
        body: dict[str, Any] = {**self.shared, "object": self.whole, "choices": [], "usage": self.usage()}
        for index, answer in enumerate(self.answers):
            choice = self.choice(index, answer)
            self.with_ids(choice, answer.tokens)
            body["choices"].append(choice)
        if self.body.return_token_ids:
            body["prompt_token_ids"] = self.prompt_ids()
        return msgspec.json.encode(body)

    def frame(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        body: dict[str, Any] = {**self.shared, "object": self.chunk, "choices": choices, **more}
        if self.body.stream_options and self.body.stream_options.include_usage:
            body.setdefault("usage", None)
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def first(self) -> bytes:
        """What opens a stream; nothing where the route has nothing to say before the first token."""
        return b""

    def last(self) -> bytes:
        wanted = self.body.stream_options and self.body.stream_options.include_usage
        return (self.frame([], usage=self.usage()) if wanted else b"") + b"data: [DONE]\n\n"

    def piece(self, index: int, token: Token, text: str) -> bytes:
        choice = self.part(index, text, [token])
        self.with_ids(choice, [token])
        more = {"prompt_token_ids": self.prompt_ids()} if self.body.return_token_ids and not self.announced else {}
        self.announced = True
        return self.frame([choice], **more)

    def with_ids(self, choice: dict[str, Any], tokens: Sequence[Token]) -> None:
        """Add the tokens' ids and the version of the weights that sampled them, where `return_token_ids` is set."""
        if self.body.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
            if self.version is not None:
                choice["policy_version"] = self.version

    def prompt_ids(self) -> list[Any]:
        """Of one prompt its ids, of several a list each."""
        ids = [list(prompt) for prompt in self.prompts]
        return ids[0] if len(ids) == 1 else ids

    def usage(self) -> dict[str, int]:
        prompt, completion = sum(map(len, self.prompts)), sum(len(answer.tokens) for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def part(self, index: int, text: str, tokens: Sequence[Token], reason: str | None = None) -> dict[str, Any]:
        raise NotImplementedError


class ChatWriter(Writer):
    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> bytes:
        more = {"prompt_token_ids": self.prompt_ids()} if self.body.return_token_ids else {}
        self.announced = True
        role = {"role": "assistant", "content": "", "refusal": None}
        choices = [
            {"index": index, "delta": role, "finish_reason": None, "logprobs": None}
            for index in range(len(self.answers))
        ]
        return self.frame(choices, **more)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        probabilities = self.logprobs(answer.tokens)
        return {"index": index, "message": message, "finish_reason": answer.finish_reason, "logprobs": probabilities}

    def part(self, index: int, text: str, tokens: Sequence[Token], reason: str | None = None) -> dict[str, Any]:
        delta = {"content": text} if tokens else {}
        probabilities = self.logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": probabilities}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.body.top() is None:
            return None
        entries = [
            {
                **_entry(token.id, token.logprob),
                "top_logprobs": [_entry(other, logprob) for other, logprob in token.top.items()],
            }
            for token in tokens
        ]
        return {"content": entries, "refusal": None}


class CompletionWriter(Writer):
    whole = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.offsets = [0] * len(self.answers)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self.part(index, answer.text, answer.tokens, answer.finish_reason)

    def part(self, index: int, text: str, tokens: Sequence[Token], reason: str | None = None) -> dict[str, Any]:
        probabilities = self.logprobs(index, tokens) if tokens else None
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": probabilities}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.body.top() is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(token.text)
        return {
            "tokens": [spelled(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [{spelled(other): finite(value) for other, value in token.top.items()} for token in tokens],
            "text_offset": offsets,
        }


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"token": spelled(token), "bytes": [token], "logprob": finite(logprob)}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold.

    Raises:
        ApiError: it is not a number; a retry would give it again.
    """
    if math.isnan(logprob):
        message = "The model's output is not a number (NaN)."
        raise ApiError(500, message, "engine_numerical_error", headers=NO_RETRY)
    return max(logprob, MINUS_INFINITY)
