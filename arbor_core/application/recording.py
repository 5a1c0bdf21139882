"""Records the completions of a live reinforcement job's model in its ledger, before the client has the last token.

The request to the engine also wants token ids and log-probabilities. They are taken out of the response again unless
the client wants them too; the policy version is put in.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from arbor_core.inference.engines import Engines
from arbor_core.models.fine_tuned import Resolved
from arbor_core.rollouts.completion_ledger import Ledger, key_of, key_of_tools, packed_floats, packed_ids
from arbor_core.types import Completion

from .engine_call import EngineCall, Header

log = logging.getLogger(__name__)
VERSION = "policy_version"
"""Key of a response, and of an engine's choice: the oldest policy that sampled any of it."""
HEADER = b"x-arbor-policy-version"
DATA, END = b"data: ", b"\n\n"
Json = dict[str, Any]


@dataclass
class Choice:
    """One choice of a response, as far as it has come."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    calls: bool = False
    """It calls a tool: it is not its text alone."""
    version: int | None = None


class Recording:
    """The choices of one response, whole or in pieces; they are written into the ledger together when all have ended.

    Args:
        body: The client's request, nulls left out.
        version: Policy version of choices for which the engine names none.
    """

    def __init__(self, ledger: Ledger, body: Json, version: int) -> None:
        self.ledger, self.body, self.version = ledger, body, version
        self.chat = "messages" in body
        self.shows_logprobs = bool(body.get("logprobs")) if self.chat else "logprobs" in body
        self.shows_tokens = bool(body.get("return_token_ids"))
        self.prompts: list[list[int]] = []
        self.choices: dict[int, Choice] = {}
        self.written = False

    def request(self, model: str) -> Json:
        """The request to the engine."""
        logprobs = {"logprobs": True} if self.chat else {"logprobs": self.body.get("logprobs", 0)}
        return {**self.body, **logprobs, "model": model, "return_token_ids": True}

    def take(self, response: Json) -> None:
        """Note what a response or a chunk of one holds, and leave in it what the client wants."""
        if (prompts := response.get("prompt_token_ids")) is not None:
            self.prompts = prompts if prompts and isinstance(prompts[0], list) else [prompts]
            if not self.shows_tokens:
                del response["prompt_token_ids"]
        for choice in response["choices"]:
            self._take(choice, self.choices.setdefault(choice["index"], Choice()))
        response[VERSION] = self.oldest

    @property
    def oldest(self) -> int:
        """The oldest policy version that sampled any of the response so far."""
        versions = [choice.version for choice in self.choices.values() if choice.version is not None]
        return min(versions, default=self.version)

    def _take(self, choice: Json, so_far: Choice) -> None:
        version = choice.pop(VERSION, None)
        if version is not None:
            so_far.version = version if so_far.version is None else min(version, so_far.version)
        so_far.tokens += (choice.get("token_ids") if self.shows_tokens else choice.pop("token_ids", None)) or ()
        so_far.logprobs += logprobs_of(choice.get("logprobs"))
        if not self.shows_logprobs:
            choice["logprobs"] = None
        message = choice.get("message") or choice.get("delta") or choice
        so_far.calls = so_far.calls or bool(message.get("tool_calls"))
        so_far.text += (message.get("content") if self.chat else message.get("text")) or ""
        so_far.finish = choice.get("finish_reason") or so_far.finish

    @property
    def ended(self) -> bool:
        """Whether every choice has its last token."""
        wanted = max(1, len(self.prompts)) * self.body.get("n", 1)
        return len(self.choices) == wanted and all(choice.finish for choice in self.choices.values())

    def write(self, id: str) -> None:
        """Write the choices into the ledger, once."""
        if self.written:
            return
        self.written = True
        if not self.prompts or not all(choice.tokens for choice in self.choices.values()):
            log.warning("completion %s: the engine gives no token ids, so that it cannot be rewarded by its id", id)
            return
        for index, choice in self.choices.items():
            self.ledger.add(self._completion(id, index, choice))

    def _completion(self, id: str, index: int, choice: Choice) -> Completion:
        at = index // self.body.get("n", 1)
        known = len(choice.logprobs) == len(choice.tokens)
        return Completion(
            id=id,
            index=index,
            version=self.version if choice.version is None else choice.version,
            prompt=packed_ids(self.prompts[at]),
            tokens=packed_ids(choice.tokens),
            logprobs=packed_floats(choice.logprobs) if known else b"",
            temperature=float(self.body.get("temperature", 1.0)),
            finish=choice.finish,
            key=b"" if choice.calls else key_of(self._messages(at), choice.text),
            toolset=key_of_tools(self._tools),
        )

    @property
    def _tools(self) -> list[Json] | None:
        """Those that the chat template got."""
        return None if self.body.get("tool_choice") == "none" else self.body.get("tools")

    def _messages(self, at: int) -> list[Json]:
        """The conversation; a plain prompt is a message without a role."""
        if self.chat:
            return list(self.body["messages"])
        prompt = self.body["prompt"]
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return [{"content": prompt[at] if several else prompt}]


class RecordedCall(EngineCall):
    """A completion of a live reinforcement job's model."""

    def __init__(
        self,
        engines: Engines,
        resolved: Resolved,
        path: str,
        body: Json,
        ledger: Ledger,
        conversation: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self.recording = Recording(ledger, body, resolved.version)
        raw = msgspec.json.encode(self.recording.request(resolved.name))
        super().__init__(engines, resolved, path, raw, bool(body.get("stream")), conversation)
        self.model = resolved.live
        self.headers: list[Header] = [self._header(resolved.version)]

    def superseded(self) -> None:
        """The policy of the request was superseded before it was loaded: this one answers."""
        self.recording.version = self.resolved.version
        self.body = msgspec.json.encode(self.recording.request(self.resolved.name))
        self.headers[:] = [self._header(self.resolved.version)]

    def _header(self, version: int) -> Header:
        return HEADER, str(version).encode()

    def finished(self, raw: bytes) -> bytes:
        """A whole response, once it is in the ledger."""
        response = msgspec.json.decode(raw)
        self.recording.take(response)
        self.recording.write(response["id"])
        self.headers = [self._header(response[VERSION])]
        return msgspec.json.encode({**response, "model": self.model})

    async def chunks(self, answer: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A stream, event by event; it is in the ledger before the event with its last token is sent."""
        held = b""
        async for chunk in answer:
            *events, held = (held + chunk).split(END)
            for event in events:
                yield self._event(event) + END

    def _event(self, event: bytes) -> bytes:
        """An event for the client. Comments, errors and the end of a stream stay as they are."""
        if not event.startswith(DATA + b"{"):
            return event
        response = msgspec.json.decode(event[len(DATA) :])
        if "choices" not in response:
            return event
        self.recording.take(response)
        if self.recording.ended:
            self.recording.write(response["id"])
        return DATA + msgspec.json.encode({**response, "model": self.model})


def logprobs_of(response: Json | None) -> list[float]:
    """The log-probabilities of the sampled tokens, in the shape of either route."""
    if response is None:
        return []
    if "token_logprobs" in response:
        return list(response["token_logprobs"])
    return [token["logprob"] for token in response.get("content") or ()]
