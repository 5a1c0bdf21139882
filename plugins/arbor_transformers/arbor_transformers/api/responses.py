"""Answers in OpenAI's shapes, whole and in chunks."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from arbor_transformers.generation.detokenizer import TokenText
from arbor_transformers.generation.sequence import Delta, Token

Json = dict[str, Any]
FLOOR = -9999.0
"""What OpenAI writes for a log-probability of minus infinity, which JSON cannot hold."""


class Answer:
    """One answer being written. A subclass knows the shapes of one route.

    Args:
        model: The name in the request.
        texts: Shows single tokens.
        prompts: Token ids of each prompt.
        logprobs: Whether choices carry log-probabilities.
        token_ids: Whether token ids are reported.
        usage: Whether a stream ends with the usage.
    """

    prefix: str
    whole: str
    part: str

    def __init__(
        self,
        model: str,
        texts: TokenText,
        prompts: Sequence[Sequence[int]],
        *,
        logprobs: bool,
        token_ids: bool,
        usage: bool,
    ) -> None:
        self.texts, self.prompts = texts, prompts
        self.logprobs, self.token_ids, self.with_usage = logprobs, token_ids, usage
        self.completion_tokens = 0
        self.head: Json = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def complete(self, deltas: Sequence[Delta]) -> Json:
        """The whole answer; one delta per choice, in order."""
        body = {**self.head, "object": self.whole, "choices": [self.choice(delta) for delta in deltas]}
        body["usage"] = self.usage()
        if self.token_ids:
            body["prompt_token_ids"] = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        return body

    def opening(self, choices: int) -> list[Json]:
        """The chunks before any token, on routes that have them."""
        return []

    def chunk(self, delta: Delta) -> Json:
        """One delta as a chunk of a stream."""
        return self._chunk([self.choice_part(delta)])

    def ending(self) -> Json | None:
        """The chunk with the usage, if the request wants it."""
        if not self.with_usage:
            return None
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> Json:
        prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
        }

    def choice(self, delta: Delta) -> Json:
        raise NotImplementedError

    def choice_part(self, delta: Delta) -> Json:
        raise NotImplementedError

    def _chunk(self, choices: list[Json]) -> Json:
        body = {**self.head, "object": self.part, "choices": choices}
        if self.with_usage:
            body["usage"] = None
        return body

    def _counted(self, delta: Delta) -> Json:
        """What both kinds of choice begin with."""
        self.completion_tokens += len(delta.tokens)
        body: Json = {"index": delta.choice, "finish_reason": delta.finish}
        if self.token_ids:
            body["token_ids"] = [token.id for token in delta.tokens]
            if delta.version is not None:
                body["policy_version"] = delta.version
        return body


class ChatAnswer(Answer):
    """`chat.completion` and its chunks."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {**self._counted(delta), "message": message, "logprobs": self._logprobs(delta.tokens)}

    def opening(self, choices: int) -> list[Json]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        parts = [{"index": i, "delta": delta, "finish_reason": None, "logprobs": None} for i in range(choices)]
        chunks = [self._chunk([part]) for part in parts]
        if self.token_ids:
            chunks[0]["prompt_token_ids"] = self.prompts[0]
        return chunks

    def choice_part(self, delta: Delta) -> Json:
        change = {"content": delta.text} if delta.text or not delta.finish or self.logprobs else {}
        return {**self._counted(delta), "delta": change, "logprobs": self._logprobs(delta.tokens)}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.logprobs:
            return None
        content = []
        for token in tokens:
            top = [self._entry(other, logprob) for other, logprob in token.top]
            content.append({**self._entry(token.id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        raw = self.texts.bytes(token)
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": finite(logprob)}


class CompletionAnswer(Answer):
    """`text_completion`, whole and in chunks."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"
    announced = False

    def choice(self, delta: Delta) -> Json:
        return {**self._counted(delta), "text": delta.text, "logprobs": self._logprobs(delta.tokens)}

    choice_part = choice

    def chunk(self, delta: Delta) -> Json:
        body = super().chunk(delta)
        if self.token_ids and not self.announced:
            # This route has no chunk before the first token.
            self.announced = True
            body["prompt_token_ids"] = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        return body

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.logprobs:
            return None
        return {
            "tokens": [self.texts.label(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if any(token.top for token in tokens) else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Token) -> Mapping[str, float]:
        """The alternatives, and the sampled token where it is not among them."""
        labelled = {self.texts.label(other): finite(logprob) for other, logprob in token.top}
        return labelled | {self.texts.label(token.id): finite(token.logprob)}


def finite(logprob: float) -> float:
    """Row 134: minus infinity as JSON can hold it."""
    return max(logprob, FLOOR)
