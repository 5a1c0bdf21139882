"""Whether a model has an embedding for each token that its tokenizer and its template write."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from arbor_core import JobFailed

EXCHANGE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer that a model can read.

    Args:
        rows: Of the embedding, and of the output where it has fewer: ids are below it.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """The vocabulary of a base model.

        Raises:
            JobFailed: `model_unavailable`: its template writes a token that it has no embedding for.
        """
        base: Any = model  # typed too loosely by transformers
        parts = (base.get_input_embeddings(), base.get_output_embeddings())
        found = cls(tokenizer, min(int(part.weight.shape[0]) for part in parts if part is not None))
        found.check_template()
        return found

    @property
    def padding(self) -> int:
        """The id to pad with: the tokenizer's, unless the model cannot read it. It is never looked at."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in known if token is not None and 0 <= token < self.rows), 0)

    def fault(self, ids: Iterable[int]) -> str | None:
        """Why the model cannot read these ids, naming one; None: it can."""
        wrong = next((token for token in ids if not 0 <= token < self.rows), None)
        if wrong is None:
            return None
        size = len(self.tokenizer)
        name = repr(self.tokenizer.convert_ids_to_tokens(wrong)) if 0 <= wrong < size else "no token of its tokenizer"
        return f"token {wrong} ({name}) has no row in the model's embedding: that has {self.rows}, its tokenizer {size}"

    def check_template(self) -> None:
        """Look at what the chat template writes around a question and its answer."""
        try:
            encoded: Any = self.tokenizer.apply_chat_template([*EXCHANGE], tokenize=True, return_dict=True)
        except Exception:  # there is none, or it wants another conversation: what is trained on is checked too
            return
        if fault := self.fault(encoded["input_ids"]):
            raise unreadable(f"the chat template writes what the model cannot read: {fault}")

    def check_rows(self, param: str, rows: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Look at the token ids of a file, by the lines that they are from.

        Args:
            param: The request's field that named the file.

        Raises:
            JobFailed: `model_unavailable`, with the line.
        """
        if len(self.tokenizer) <= self.rows:
            return  # it has no other ids
        for line, ids in rows:
            if fault := self.fault(ids):
                raise unreadable(f"{param}: line {line}: {fault}")


class Padding(TrainerCallback):
    """Has a model's configuration name an id to pad with that it can read, in place of the tokenizer's, which TRL and
    transformers have written there: a model that was saved with that could not be loaded."""

    def __init__(self, vocabulary: Vocabulary, model: PreTrainedModel) -> None:
        self.vocabulary, self.model = vocabulary, model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for config in (self.model.config.get_text_config(), self.model.config, self.model.generation_config):
            if (getattr(config, "pad_token_id", None) or 0) >= self.vocabulary.rows:
                config.pad_token_id = self.vocabulary.padding


def readable(config: PretrainedConfig) -> PretrainedConfig:
    """A model's configuration without an id to pad with that it has no embedding for: such a model cannot be loaded,
    though padding is never looked at."""
    described = config.get_text_config()
    if (getattr(described, "pad_token_id", None) or 0) >= getattr(described, "vocab_size", math.inf):
        described.pad_token_id = None
    return config


def unreadable(reason: str) -> JobFailed:
    advice = "use the tokenizer that the model was trained with, or resize its embedding"
    return JobFailed(f"{reason}; {advice}", code="model_unavailable", param="model")
