"""Rows and templates of people who fine-tune, by the names of their cases: what each method must make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trl_templates as t
from arbor_sft.tiny import CHAT_TEMPLATE, tokenizer
from arbor_transformers.generation.prompts import Prompts
from arbor_trl.chat import IGNORED, ChatFormat
from arbor_trl.turns import Turns

from arbor_core import LeftOutError
from arbor_core.engine import ApiError

CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Lima"}'}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
QUESTION = {"role": "user", "content": "Weather in Lima?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "assistant", "content": "It is 18."}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "18"}


def chat(template: str) -> ChatFormat:
    found = tokenizer()
    found.chat_template = template
    return ChatFormat(found)


def learned(made: ChatFormat, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    (sample,) = made.encode(made.render({"messages": messages, "tools": tools}))
    return str(made.tokenizer.decode([label for label in sample.labels if label != IGNORED]))


def prompt(made: ChatFormat, messages: list[dict[str, Any]]) -> str:
    ids = Prompts(made.tokenizer, len(made.tokenizer)).chat(messages, TOOLS, {})  # type: ignore[arg-type]
    return str(made.tokenizer.decode(ids))


def test_tool_calls_lost() -> None:
    made = chat(t.CHATML)
    with pytest.raises(LeftOutError, match=r"leaves out messages\[1\]\.tool_calls\[0\]\.function\.name$"):
        made.render({"messages": [QUESTION, CALLING], "tools": TOOLS})
    with pytest.raises(LeftOutError, match=r"messages\[1\]\.tool_calls"):  # context that an engine would lack too
        made.render({"messages": [QUESTION, {**CALLING, "weight": 0}, RESULT, {"role": "assistant", "content": "18"}]})
    with pytest.raises(ApiError) as error:
        prompt(made, [QUESTION, CALLING, RESULT])
    assert error.value.status == 400
    assert error.value.param == "messages[1].tool_calls[0].function.name"
    made = chat(t.CONTENT_NONE)
    call = '<call>get_weather\n{"city": "Lima"}</call>'
    assert learned(made, [QUESTION, CALLING], TOOLS) == call + "<|im_end|>"
    assert call in prompt(made, [QUESTION, CALLING, RESULT])
    with pytest.raises(LeftOutError, match="tool_calls"):  # beside text it cannot be written
        made.render({"messages": [QUESTION, {**CALLING, "content": "Let me see."}]})


def test_arguments_as_text() -> None:
    made = chat(t.ARGUMENTS_AS_TEXT)
    call = '<call>get_weather\n{"city": "Lima"}</call>'
    assert learned(made, [QUESTION, CALLING], TOOLS) == call + "<|im_end|>"
    assert call in prompt(made, [QUESTION, CALLING, RESULT])
    spaced = {**CALL, "function": {"name": "get_weather", "arguments": '{"city":   "Lima" }'}}
    assert '{"city":   "Lima" }' in learned(made, [QUESTION, {**CALLING, "tool_calls": [spaced]}], TOOLS)
    whole = {**CALL, "function": {"name": "get_weather", "arguments": {"city": "Líma"}}}
    assert '{"city": "Líma"}' in learned(made, [QUESTION, {**CALLING, "tool_calls": [whole]}], TOOLS)


def test_empty_tool_calls() -> None:
    made = chat(t.ONE_CALL)
    empty = {**ANSWER, "tool_calls": []}
    assert learned(made, [QUESTION, empty]) == learned(made, [QUESTION, ANSWER]) == "It is 18.<|im_end|>"
    assert prompt(made, [QUESTION, empty, QUESTION]) == prompt(made, [QUESTION, ANSWER, QUESTION])


def turns(count: int) -> list[dict[str, Any]]:
    pairs = (({**QUESTION, "content": f"and {at}?"}, {**ANSWER, "content": f"{at}"}) for at in range(count))
    return [each for pair in pairs for each in pair]


def steps(count: int) -> list[dict[str, Any]]:
    """A trace of calls; their arguments end with numbers, which leave no mark."""
    found = [QUESTION]
    for at in range(count):
        function = {"name": "run", "arguments": json.dumps({"file": f"f{at}", "line": at})}
        call = {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [{**CALL, "function": function}]}
        found += [call, {**RESULT, "content": f"out {at}"}]
    return [*found, ANSWER]


@pytest.mark.parametrize("conversation", [turns, steps])
def test_long_conversations(conversation: Callable[[int], list[dict[str, Any]]]) -> None:
    """The template runs over a number of messages that grows with theirs, and not with its square."""
    made = chat(CHAT_TEMPLATE)
    counting = Counting(made)
    counted = []
    for count in (100, 200):
        messages = conversation(count)
        (rendered,) = made.render({"messages": messages})
        assert len(rendered.spans) == sum(each["role"] == "assistant" for each in messages)
        counted.append(counting.taken() / len(messages))
    assert counted[1] < 1.2 * counted[0] < 20
    exact = Turns(made.chats, made.chats.conversation(messages, None), made.stop, closable=True)
    found = dict(
        zip((i for i, each in enumerate(messages) if each["role"] == "assistant"), rendered.spans, strict=True)
    )
    for index in list(found)[::37]:
        turn = exact.turn(index)
        assert rendered.text.startswith(turn.text[: turn.end])
        assert found[index] == (turn.begin, turn.end), "it is where it is rendered by itself"


class Counting:
    """Counts the messages that a template is given."""

    def __init__(self, made: ChatFormat) -> None:
        made.chats.form(False)  # tried once
        self.messages, apply = 0, made.chats._apply

        def counted(messages: Any, *args: Any, **kwargs: Any) -> str:
            self.messages += len(messages)
            return apply(messages, *args, **kwargs)

        made.chats._apply = counted  # type: ignore[method-assign]

    def taken(self) -> int:
        count, self.messages = self.messages, 0
        return count
