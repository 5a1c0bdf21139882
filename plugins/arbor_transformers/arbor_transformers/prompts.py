"""Prompts to token ids: plain text, token ids as given, and conversations through the model's chat template."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .errors import ApiError

RESERVED = {"conversation", "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"}
"""Names that a template or the tokenizer gives a meaning of its own."""


class Prompts:
    """Encodes prompts. Not for several threads at once: a tokenizer has state.

    Args:
        tokenizer: The model's.
        vocabulary: How many embeddings the model has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.strips = {str(t): (t.lstrip, t.rstrip) for t in tokenizer.added_tokens_decoder.values()}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def plain(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """A prompt that is no conversation."""
        return self.text(prompt) if isinstance(prompt, str) else self.ids(prompt)

    def ids(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """A prompt of token ids, checked against the vocabulary (row 137: an embedding look-up must not see others)."""
        for position, token in enumerate(prompt):
            if not 0 <= token < self.vocabulary:
                message = f"Invalid 'prompt': token {token} at position {position} is not in 0..{self.vocabulary - 1}."
                raise ApiError(message, "invalid_value", "prompt")
        return self._some(tuple(prompt), "prompt")

    def text(self, prompt: str) -> tuple[int, ...]:
        """A plain text; control tokens written in it count as such, the caller has the model's whole input."""
        return self._some(tuple(self.tokenizer(prompt).input_ids), "prompt")

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, extras: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """A conversation through the chat template.

        Control tokens written inside a message are encoded as the characters they are made of. While the template
        runs they are replaced by words nobody can guess, so that whatever control tokens it puts out are its own.
        """
        veil = Veil(self.control)
        rendered = self._render(veil.cover(list(messages)), veil.cover(tools), extras)
        if not veil.found:
            return self._some(tuple(self.tokenizer(rendered, add_special_tokens=False).input_ids), "messages")
        pieces = self.control.split(rendered) if self.control else [rendered]
        ids: list[int] = []
        for at, piece in enumerate(pieces):
            if at % 2:
                ids.append(self.special[piece])
                continue
            text = piece.lstrip() if at and self.strips[pieces[at - 1]][1] else piece
            text = text.rstrip() if at + 1 < len(pieces) and self.strips[pieces[at + 1]][0] else text
            ids += self.tokenizer(veil.lift(text), add_special_tokens=False, split_special_tokens=True).input_ids
        return self._some(tuple(ids), "messages")

    def _render(self, messages: list[Any], tools: Any, extras: Mapping[str, Any]) -> str:
        if not self.tokenizer.chat_template:
            message = "This model has no chat template. Use /v1/completions, or a model with one."
            raise ApiError(message, "unsupported_parameter", "messages")
        clash = RESERVED & extras.keys()
        if clash:
            message = f"'chat_template_kwargs' cannot set {', '.join(sorted(clash))}."
            raise ApiError(message, "invalid_value", "chat_template_kwargs")
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, **extras
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # Templates refuse conversations by raising, and fail in Python's ways on shapes they did not foresee.
            message = f"The model's chat template cannot render these messages: {error}"
            raise ApiError(message, "invalid_value", "messages") from None
        return str(rendered)

    def _some(self, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
        if not ids:
            raise ApiError(f"Invalid '{param}': it holds no tokens, expected at least one.", "invalid_value", param)
        return ids


class Veil:
    """Replaces control tokens in text by unguessable words, and back."""

    def __init__(self, control: re.Pattern[str] | None) -> None:
        self.control = control
        self.found: list[str] = []
        self.secret = secrets.token_hex(12)

    def cover(self, value: Any) -> Any:
        """The same value with every string in it covered."""
        if isinstance(value, str):
            return self.control.sub(self._word, value) if self.control else value
        if isinstance(value, Mapping):
            return {self.cover(key): self.cover(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.cover(item) for item in value]
        return value

    def lift(self, text: str) -> str:
        return re.sub(f"x{self.secret}n([0-9]+)x", lambda match: self.found[int(match[1])], text)

    def _word(self, match: re.Match[str]) -> str:
        self.found.append(match[0])
        return f"x{self.secret}n{len(self.found) - 1}x"


def as_template_wants(message: Mapping[str, Any]) -> dict[str, Any]:
    """A request's message in the form that chat templates are written for.

    Text parts become one text, `developer` is the older `system`, arguments of tool calls are objects, not JSON.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = "\n".join(part["text"] for part in plain["content"])
    plain.setdefault("content", "")
    if plain["role"] == "developer":
        plain["role"] = "system"
    if "tool_calls" in plain:
        plain["tool_calls"] = [_call(call) for call in plain["tool_calls"]]
    return plain


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        function["arguments"] = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        # A model may have written arguments that are not JSON; templates print a string as it is.
        function.setdefault("arguments", "")
    return {**call, "function": function}
