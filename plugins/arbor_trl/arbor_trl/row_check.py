"""Rows of chats as the chat template of a model renders them, looked at before the job is queued, in the validator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from arbor_core import canonical, shape_of

from .chat import ChatFormat

REMEMBERED = 10_000
"""Shapes of rows."""


def row_check(model: str) -> Callable[[dict[str, Any]], Sequence[str]] | None:
    """The check of rows for a model. Not for a process that needs torch: importing that takes seconds, and more memory
    than a validator may have, so transformers does without.

    Args:
        model: Folder or hub id.

    Returns:
        None where there is nothing to look at, no tokenizer on this machine or no template: the trainer says so, when
        it loads them.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # Python's way to say that there is none
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
        return RowCheck(ChatFormat(tokenizer))
    except Exception:  # transformers, tokenizers and the hub raise many kinds
        return None


class RowCheck:
    """Renders a row of each shape, as training renders all; rows with faults each by itself."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.known: dict[Hashable, tuple[str, ...]] = {}
        """The warnings for rows of a shape that can be used."""

    def __call__(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Warnings.

        Raises:
            ValueError: the row cannot be trained on with this template.
        """
        row = canonical(row)
        shape = self._shape(row)
        if shape not in self.known:
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            lost: set[str] = set()
            self.chat.render(row, lost.add)
            self.known[shape] = tuple(
                f"the model's chat template leaves out {key}, which is not learned" for key in sorted(lost)
            )
        return self.known[shape]

    def _shape(self, row: Mapping[str, Any]) -> Hashable:
        messages = [self.chat.chats.message(message, tools=bool(row.get("tools"))) for message in row["messages"]]
        weights = tuple(message.get("weight", 1) for message in row["messages"])
        return tuple((message["role"], shape_of(message)) for message in messages), weights, bool(row.get("tools"))
