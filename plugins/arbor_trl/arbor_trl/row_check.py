"""Rows of chats as the chat template of a model renders them, looked at before the job is queued, in the validator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from arbor_core import UNSAID, canonical, canonical_message, shape_of

from .chat import ChatFormat
from .traits import Traits

REMEMBERED = 10_000
"""Shapes of rows."""
PLAIN = {"role", "content", "name", "weight", "tool_call_id"}
"""Keys of messages that are a text and little else, as nearly all are; a look at them has to be quick."""
CALLING = {"role", "content", "name", "weight", "tool_calls"}
"""Keys of messages with calls and little else."""
NESTED = 40
"""Arguments with so many arrays and objects are looked at more closely."""


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
    """Renders a row of each shape, as training renders all; rows with faults each by itself. Shapes differ in whatever
    the template looks at."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat, self.traits = chat, Traits.of(chat.tokenizer.chat_template)
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
                f"the model's chat template leaves out {each}, which is not {'learned' if each in UNSAID else 'read'}"
                for each in sorted(lost)
            )
        return self.known[shape]

    def _shape(self, message: Mapping[str, Any], tools: bool) -> Hashable:
        """What of a message this template may look at; see `shape_of`, which of a text without tags only says that."""
        content = message.get("content")
        if type(content) is str and "<" not in content and content and not content.isspace():
            kind = self.traits(content)
            if len(message) == 2:
                return (message["role"], kind) if kind else str(message["role"])
            if message.keys() <= PLAIN:
                kinds = tuple([(key, type(value)) for key, value in message.items()])
                return message["role"], message.get("weight"), kinds, kind
        if message.get("tool_calls") and message.keys() <= CALLING and (shape := self._calling(message, tools)):
            return shape
        form = self.chat.chats.message(canonical_message(message), tools=tools)
        texts = tuple([self.traits(text) for text in texts_of(form)])
        return form["role"], message.get("weight"), shape_of(form), texts

    def _calling(self, message: Mapping[str, Any], tools: bool) -> Hashable:
        """The same for a message whose calls have JSON objects as text, without putting it into the template's form:
        shapes that differ there differ here. None: it has to be put into that."""
        content, calls = message.get("content") or "", message["tool_calls"]
        if type(content) is not str:
            return None
        found = []
        for call in calls:
            text = call["function"]["arguments"]
            if type(text) is not str or text.count("{") + text.count("[") > NESTED:
                return None
            try:
                arguments = msgspec.json.decode(text)
            except msgspec.DecodeError:
                return None
            if type(arguments) is not dict:
                return None
            found.append({"function": {"arguments": arguments}})
        texts = [content, *(call["function"]["name"] for call in calls)]
        if self.chat.chats.form(tools).arguments == "text":
            texts += [call["function"]["arguments"] for call in calls]
        kinds = tuple([(key, type(value)) for key, value in message.items()])
        shape = shape_of({"content": content, "tool_calls": found})
        return message.get("weight"), kinds, shape, tuple([self.traits(text) for text in texts])


def texts_of(form: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a message in the form that a template is given."""
    for key in ("content", *UNSAID):
        value = form.get(key)
        yield from [value] if isinstance(value, str) else [part["text"] for part in value or ()]
    for call in form.get("tool_calls") or ():
        yield from (each for each in call["function"].values() if isinstance(each, str))
