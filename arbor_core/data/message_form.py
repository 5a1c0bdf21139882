"""In which form a chat template takes messages: found by trying, once for each template.

Templates are written for what their authors' programs sent: some join a call's arguments as text and some need an
object, some write a call only where content is null, some iterate over parts. What does not fit is often lost without a
word. So a call and a thought whose words nobody can guess are rendered in each form, until all of them are found.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import msgspec

from arbor_core.storage.codec import MAX_DEPTH, check_depth

Message = dict[str, Any]
Render = Callable[[Sequence[Message], Sequence[Any] | None], str]
"""Messages and tools to text; raises whatever the template raises."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates take what was thought before an answer; the first is the usual one."""
UNSAID = (*THOUGHTS, "tool_plan")
"""Keys of what is no part of the answer (Command R's plan is written beside a thought): a template may drop it."""


class MessageForm(msgspec.Struct, frozen=True):
    """What a template is given. The defaults are what most templates are written for."""

    arguments: Literal["object", "text"] = "object"
    """A call's arguments: an object, or the JSON text of one."""
    no_content: Literal["empty", "null"] = "empty"
    """The content of a message that has calls and no text."""
    content: Literal["text", "parts"] = "text"
    thought: str = THOUGHTS[0]

    def message(self, given: Mapping[str, Any]) -> Message:
        """A message of OpenAI's API in this form, without what is null or empty."""
        message = {key: value for key, value in given.items() if value is not None and key not in HIDDEN_KEYS}
        text = text_of(given)
        calls = calls_of(given)
        null = bool(calls) and not text and self.no_content == "null"
        message["content"] = None if null else [{"type": "text", "text": text}] if self.content == "parts" else text
        if calls:
            message["tool_calls"] = [self._call(call) for call in calls]
        if thought := thought_of(given):
            message[self.thought] = thought
        return message

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call.get("function") or {})
        arguments = function.get("arguments")
        if self.arguments == "text":
            text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            function["arguments"] = text or "{}"
        else:
            function["arguments"] = parsed(arguments)
        return {**call, "function": function}


HIDDEN_KEYS = ("weight", "function_call", "tool_calls", *THOUGHTS)
"""Keys of a message that no template sees as they are: `weight` is for the trainer, the others are put into form."""


def text_of(message: Mapping[str, Any]) -> str:
    """A message's text: parts one after the other, and a refusal that is not among them."""
    content, refusal = message.get("content"), str(message.get("refusal") or "")
    if isinstance(content, list):
        text = "".join(part.get("text") or part.get("refusal") or "" for part in content)
    else:
        text = str(content or "")
    return text if refusal in text else f"{text}\n{refusal}" if text else refusal


def calls_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A message's tool calls; `function_call` is one."""
    calls = list(message.get("tool_calls") or [])
    if call := message.get("function_call"):
        calls.append({"type": "function", "function": call})
    return calls


def thought_of(message: Mapping[str, Any]) -> str | None:
    """What was thought before the answer, where the message says so in a key of its own."""
    return next((message[key] for key in THOUGHTS if isinstance(message.get(key), str) and message[key]), None)


def tool_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A tool without what is null, of itself or of its function: tables write each key that some tool has."""
    tool = {key: value for key, value in given.items() if value is not None}
    if isinstance(function := tool.get("function"), Mapping):
        tool["function"] = {key: value for key, value in function.items() if value is not None}
    return tool


def parsed(arguments: Any) -> Any:
    """A call's arguments as an object. What a model has written may be no JSON object, or one that is nested too deeply
    or holds half a character (`\\ud800`), which no tokenizer takes: that stays text."""
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
        if not isinstance(arguments, str) or arguments.count("{") + arguments.count("[") >= MAX_DEPTH - 4:
            check_depth([[[[found]]]], "arguments")  # in a function of a call of a message
        if isinstance(arguments, str) and "\\u" in arguments:
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def find_form(render: Render, *, tools: bool) -> MessageForm:
    """The form in which a template loses nothing, or the usual one where each loses something.

    Args:
        render: Renders a conversation without a generation prompt.
        tools: Try with a tool beside the messages.
    """
    trial = _Trial(render, tools)
    usual = next(filter(trial.text, (MessageForm(), MessageForm(content="parts"))), MessageForm())
    calls = next(filter(trial.calls, _call_forms(usual)), usual)
    thoughts = (msgspec.structs.replace(calls, thought=key) for key in THOUGHTS)
    return next(filter(trial.thought, thoughts), calls)


def _call_forms(usual: MessageForm) -> Iterator[MessageForm]:
    for arguments, no_content in product(("object", "text"), ("empty", "null")):
        yield msgspec.structs.replace(usual, arguments=arguments, no_content=no_content)


class _Trial:
    """A conversation about words that nobody can guess."""

    def __init__(self, render: Render, tools: bool) -> None:
        self.render = render
        self.name, self.key, self.value, self.said, self.thinks = (f"w{secrets.token_hex(6)}" for _ in range(5))
        schema = {"type": "object", "properties": {self.key: {"type": "string", "description": "A word."}}}
        function = {"name": "lookup", "description": "Looks it up.", "parameters": schema}
        self.tools = [{"type": "function", "function": function}] if tools else None

    def text(self, form: MessageForm) -> bool:
        """Whether content is found, and its parts not in Python's notation."""
        rendered = self._rendered(form, {"content": self.said})
        return self.said in rendered and f"'text': '{self.said}" not in rendered

    def calls(self, form: MessageForm) -> bool:
        """Whether a call without text is found whole, and not in Python's notation or as text within text."""
        arguments = {self.key: self.value}
        function = {"name": self.name, "arguments": json.dumps(arguments)}
        call = {"id": "call00001", "type": "function", "function": function}  # some take ids of nine letters only
        rendered = self._rendered(form, {"content": None, "tool_calls": [call]})
        spoiled = (repr(arguments), f'\\"{self.key}\\"')
        found = all(word in rendered for word in (self.name, self.key, self.value))
        return found and not any(each in rendered for each in spoiled)

    def thought(self, form: MessageForm) -> bool:
        return self.thinks in self._rendered(form, {"content": self.said, THOUGHTS[0]: self.thinks})

    def _rendered(self, form: MessageForm, answer: Mapping[str, Any]) -> str:
        question = {"role": "user", "content": "What does it say?"}
        try:
            return self.render([form.message(each) for each in (question, {"role": "assistant", **answer})], self.tools)
        except Exception:  # a stranger's code: another form may suit it
            return ""
