"""What the model of a live reinforcement job says is written into the job's ledger before its client has heard it all.

The engine is asked for token ids and log-probabilities besides what the client asked for; the client hears what it
asked for, and the policy version.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from arbor_core.inference.engines import Engines
from arbor_core.models.fine_tuned import Resolved
from arbor_core.rollouts.ledger import Ledger, key_of, key_of_tools, packed_floats, packed_ids
from arbor_core.server.http.sse import Header
from arbor_core.types import Completion

from .relay import Relay

log = logging.getLogger(__name__)
VERSION = "policy_version"
"""Key of an answer, and of an engine's choice: the oldest policy that sampled any of it."""
HEADER = b"x-arbor-policy-version"
DATA, END = b"data: ", b"\n\n"
Json = dict[str, Any]


@dataclass
class Choice:
    """What has come of one choice."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    calls: bool = False
    """It calls a tool: it is not its text alone."""
    version: int | None = None


class Recording:
    """Takes the choices of one answer apart, whole or in pieces, and writes them down together when all have ended.

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

    def asked(self, model: str) -> Json:
        """The request as the engine hears it."""
        logprobs = {"logprobs": True} if self.chat else {"logprobs": self.body.get("logprobs", 0)}
        return {**self.body, **logprobs, "model": model, "return_token_ids": True}

    def take(self, said: Json) -> None:
        """Note what an answer or a chunk of one holds, and leave of it what the client asked for."""
        if (prompts := said.get("prompt_token_ids")) is not None:
            self.prompts = prompts if prompts and isinstance(prompts[0], list) else [prompts]
            if not self.shows_tokens:
                del said["prompt_token_ids"]
        for choice in said["choices"]:
            self._take(choice, self.choices.setdefault(choice["index"], Choice()))
        said[VERSION] = self.oldest

    @property
    def oldest(self) -> int:
        """The oldest policy version that sampled any of the answer so far."""
        versions = [choice.version for choice in self.choices.values() if choice.version is not None]
        return min(versions, default=self.version)

    def _take(self, choice: Json, noted: Choice) -> None:
        version = choice.pop(VERSION, None)
        if version is not None:
            noted.version = version if noted.version is None else min(version, noted.version)
        noted.tokens += (choice.get("token_ids") if self.shows_tokens else choice.pop("token_ids", None)) or ()
        noted.logprobs += logprobs_of(choice.get("logprobs"))
        if not self.shows_logprobs:
            choice["logprobs"] = None
        message = choice.get("message") or choice.get("delta") or choice
        noted.calls = noted.calls or bool(message.get("tool_calls"))
        noted.text += (message.get("content") if self.chat else message.get("text")) or ""
        noted.finish = choice.get("finish_reason") or noted.finish

    @property
    def ended(self) -> bool:
        """Whether every choice has its last token."""
        wanted = max(1, len(self.prompts)) * self.body.get("n", 1)
        return len(self.choices) == wanted and all(choice.finish for choice in self.choices.values())

    def write(self, id: str) -> None:
        """Write the choices down, once."""
        if self.written:
            return
        self.written = True
        if not self.prompts or not all(choice.tokens for choice in self.choices.values()):
            log.warning("completion %s: the engine tells no token ids, so that it cannot be rewarded by its id", id)
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
        """Those that the template was shown."""
        return None if self.body.get("tool_choice") == "none" else self.body.get("tools")

    def _messages(self, at: int) -> list[Json]:
        """What was answered; a plain prompt is nobody's message."""
        if self.chat:
            return list(self.body["messages"])
        prompt = self.body["prompt"]
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return [{"content": prompt[at] if several else prompt}]


class RecordingRelay(Relay):
    """A relay to the model of a live reinforcement job."""

    def __init__(self, engines: Engines, resolved: Resolved, path: str, body: Json, ledger: Ledger) -> None:
        self.recording = Recording(ledger, body, resolved.version)
        raw = msgspec.json.encode(self.recording.asked(resolved.name))
        super().__init__(engines, resolved, path, raw, bool(body.get("stream")))
        self.model = resolved.live
        self.headers: list[Header] = [self._header(resolved.version)]

    def _header(self, version: int) -> Header:
        return HEADER, str(version).encode()

    def finished(self, raw: bytes) -> bytes:
        """A whole answer, written down."""
        said = msgspec.json.decode(raw)
        self.recording.take(said)
        self.recording.write(said["id"])
        self.headers = [self._header(said[VERSION])]
        return msgspec.json.encode({**said, "model": self.model})

    async def chunks(self, answer: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A stream, event by event; it is written down before the event with its last token is passed on."""
        held = b""
        async for chunk in answer:
            *events, held = (held + chunk).split(END)
            for event in events:
                yield self._passed_on(event) + END

    def _passed_on(self, event: bytes) -> bytes:
        """Comments, errors and the end of a stream are passed on as they are."""
        if not event.startswith(DATA + b"{"):
            return event
        said = msgspec.json.decode(event[len(DATA) :])
        if "choices" not in said:
            return event
        self.recording.take(said)
        if self.recording.ended:
            self.recording.write(said["id"])
        return DATA + msgspec.json.encode({**said, "model": self.model})


def logprobs_of(said: Json | None) -> list[float]:
    """The log-probabilities of the sampled tokens, in the shape of either route."""
    if said is None:
        return []
    if "token_logprobs" in said:
        return list(said["token_logprobs"])
    return [token["logprob"] for token in said.get("content") or ()]
