"""Prompts to token ids: plain text, token ids as given, and conversations through the model's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from arbor_core import Chats, LeftOutError
from arbor_core.engine import ApiError

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
        self.chats = Chats(tokenizer)

    def plain(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """A prompt that is no conversation."""
        return self.text(prompt) if isinstance(prompt, str) else self.ids(prompt)

    def ids(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """A prompt of token ids, checked against the vocabulary (row 137: an embedding look-up must not see others)."""
        for position, token in enumerate(prompt):
            if not 0 <= token < self.vocabulary:
                message = f"Invalid 'prompt': token {token} at position {position} is not in 0..{self.vocabulary - 1}."
                raise ApiError(400, message, "invalid_value", "prompt")
        return self._some(tuple(prompt), "prompt")

    def text(self, prompt: str) -> tuple[int, ...]:
        """A plain text; control tokens written in it count as such, the caller has the model's whole input."""
        return self._some(tuple(self.tokenizer(prompt).input_ids), "prompt")

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, extras: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """A conversation through the chat template, as it was trained on (`arbor_core.Chats`)."""
        if not self.tokenizer.chat_template:
            message = "This model has no chat template. Use /v1/completions, or a model with one."
            raise ApiError(400, message, "unsupported_parameter", "messages")
        clash = RESERVED & extras.keys()
        if clash:
            message = f"'chat_template_kwargs' cannot set {', '.join(sorted(clash))}."
            raise ApiError(400, message, "invalid_value", "chat_template_kwargs")
        try:
            conversation = self.chats.conversation(messages, tools)
            text = self.chats.prompt(conversation, extras)
        except LeftOutError as error:
            # the answer would not know of it
            raise ApiError(400, f"{str(error)[0].upper()}{str(error)[1:]}.", "invalid_value", error.field) from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # Templates refuse conversations by raising, and fail in Python's ways on shapes they did not foresee.
            message = f"The model's chat template cannot render these messages: {error}"
            raise ApiError(400, message, "invalid_value", "messages") from None
        return self._some(tuple(self.chats.encode(text)[0]), "messages")

    def _some(self, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
        if not ids:
            raise ApiError(
                400, f"Invalid '{param}': it holds no tokens, expected at least one.", "invalid_value", param
            )
        return ids
