"""Rows of chats as the chat template of a model renders them, looked at before the job is queued, in the validator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from arbor_core import canonical, canonical_message, shape_of

from .chat import ChatFormat

REMEMBERED = 10_000
"""Shapes of rows."""
PLAIN = {"role", "content", "name", "weight", "tool_call_id"}
"""Keys of messages that are a text and little else, as nearly all are; a look at them has to be quick."""


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
        tools = bool(row.get("tools") or row.get("functions"))
        shape = tools, tuple([self._shape(message, tools) for message in row["messages"]])
        if shape not in self.known:
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            lost: set[str] = set()
            self.chat.render(canonical(row), lost.add)
            self.known[shape] = tuple(
                f"the model's chat template leaves out {key}, which is not learned" for key in sorted(lost)
            )
        return self.known[shape]

    def _shape(self, message: Mapping[str, Any], tools: bool) -> Hashable:
        """What of a message templates may look at; see `shape_of`, which of a text without tags only says that."""
        content = message.get("content")
        if type(content) is str and "<" not in content and content and not content.isspace():
            if len(message) == 2:
                return str(message["role"])
            if message.keys() <= PLAIN:
                kinds = tuple([(key, type(value)) for key, value in message.items()])
                return message["role"], message.get("weight"), kinds
        form = self.chat.chats.message(canonical_message(message), tools=tools)
        return form["role"], message.get("weight"), shape_of(form)
