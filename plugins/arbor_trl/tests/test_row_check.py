"""What the validator finds when it looks at rows with a model's chat template, in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trl_templates as t
from arbor_sft.tiny import tokenizer
from arbor_trl.chat import ChatFormat, Rendered
from arbor_trl.row_check import RowCheck

from arbor_core.data.validator import FileCheck, Report

QUESTION = {"role": "user", "content": "Weather in Lima?"}
ANSWER = {"role": "assistant", "content": "It is 18."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
PLAIN = {"messages": [QUESTION, ANSWER]}
CALLING = {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
LEGACY = {"messages": [QUESTION, {"role": "assistant", "content": None, "function_call": CALL["function"]}]}
THINKING = {"messages": [QUESTION, {**ANSWER, "reasoning_content": "Easy."}]}


def validated(path: Path, template: str, rows: Sequence[Mapping[str, Any]]) -> Report:
    """The report of a validator on rows for the tiny tokenizer with a template."""
    model = tokenizer()
    model.chat_template = template
    model.save_pretrained(path / "model")
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = FileCheck(
        "arbor_core.data.rows:check_chat_row",
        min_rows=1,
        training_file=str(file),
        model_check="arbor_trl.row_check:row_check",
        model=str(path / "model"),
    )
    command = [sys.executable, "-m", "arbor_core.data.validator", msgspec.json.encode(check).decode()]
    ran = subprocess.run(command, capture_output=True, timeout=300, check=True)
    return msgspec.json.decode(ran.stdout, type=Report)


def test_tool_calls_lost(tmp_path: Path) -> None:
    """A job fails before it is queued, with the line and the key."""
    error = validated(tmp_path, t.CHATML, [PLAIN, PLAIN, CALLING, PLAIN]).error
    assert error is not None
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert error["message"].startswith("1 line(s)")
    assert "line 3: the model's chat template leaves out messages[1].tool_calls[0].function.name" in error["message"]


def test_thoughts_lost_are_a_warning(tmp_path: Path) -> None:
    report = validated(tmp_path, t.CHATML, [PLAIN, THINKING, THINKING])
    assert report.error is None
    (warning,) = report.warnings
    assert "the model's chat template leaves out reasoning_content, which is not learned (2 time(s)" in warning
    assert "first at line 2" in warning


def test_rows_of_a_shape_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tokenizer()
    found.chat_template = t.HERMES
    chat = ChatFormat(found)
    rendered, render = [], chat.render

    def counted(row: dict[str, Any], warn: Callable[[str], None] | None = None) -> list[Rendered]:
        rendered.append(row)
        return render(row, warn)

    monkeypatch.setattr(chat, "render", counted)
    check = RowCheck(chat)
    answers = [{"messages": [QUESTION, {**ANSWER, "content": f"It is {degrees}."}]} for degrees in range(20)]
    assert [list(check(row)) for row in (*answers, CALLING, LEGACY, CALLING)] == [[]] * 23
    assert len(rendered) == 3  # the former name of a call is another key


def test_rows_of_other_shapes_are_rendered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, rendered = ChatFormat(tokenizer()), []
    monkeypatch.setattr(chat, "render", lambda row, warn: rendered.append(row) or [])
    check = RowCheck(chat)
    tool = {"type": "function", "function": {"name": "get_weather"}}
    said = [QUESTION, {**QUESTION, "content": " "}, {**QUESTION, "content": "<b>"}, {**QUESTION, "name": "ann"}]
    said += [{**QUESTION, "name": None}, {**QUESTION, "role": "system"}, {**QUESTION, "reasoning": "hm"}]
    answers = [[ANSWER], [{**ANSWER, "weight": 0}, QUESTION, ANSWER], [{**ANSWER, "weight": 1}, QUESTION, ANSWER]]
    rows = [{"messages": [one, *rest]} for one in said for rest in answers]
    rows += [{"messages": [QUESTION, ANSWER], "tools": [tool]}]
    for row in (*rows, *rows):
        check(row)
    assert len(rendered) == len(rows)


SPLITTING = """{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}
{%- for call in message.tool_calls %}{{ call.function.name if '_' in call.function.name else '?' }}
{%- if call.function.arguments is string %}{{ call.function.arguments[:40] }}{% else %}
{%- for key, value in call.function.arguments.items() %}{{ key }}{{ value }}{% endfor %}{% endif %}
{%- endfor %}{{ '<|im_end|>' }}{% endfor %}"""
"""It looks at what calls are made of."""
TEXTS = """{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}
{%- for call in message.tool_calls %}{{ call.function.name + call.function.arguments }}
{%- if call.function.arguments.startswith('{"a": 1') %}!{% endif %}
{%- endfor %}{{ '<|im_end|>' }}{% endfor %}"""
"""It takes arguments as text, and looks into them."""
ARGUMENTS = [
    *("{}", '{"a": 1}', '{"a": 2}', '{"a": 0}', '{"b": 1}', '{"a": 1.5}', '{"a": "x"}', '{"a": ""}', '{"a": null}'),
    *('{"a": [1]}', '{"a": [2, 3]}', '{"a": []}', '{"a": {"b": 1}}', '{"a": {"b": 2}}', '{"a": "<b>"}', '{"a": true}'),
    *('["x"]', '["_"]', '"x"', "", "no JSON", '{"a": NaN}', '{"a": "\\n"}', '{"a": "\\ud800"}', '{"a": 1, "b": 2}'),
    *('{"a": "' + "x" * 50 + '"}', '{"a": ' + "[" * 50 + "]" * 50 + "}"),
]
SAID = [{"content": "Yes."}, {"content": "<b>"}, {"content": "_"}, {"content": [{"type": "text", "text": "Yes."}]}]
SAID += [{"content": "Yes.", "weight": weight} for weight in (0, 1)]


@pytest.mark.parametrize("template", [t.CHATML, SPLITTING, TEXTS], ids=["chatml", "splitting", "texts"])
def test_messages_with_calls_differ_as_they_do_when_looked_at_closely(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that are taken for alike quickly, one would do for the other too."""
    model = tokenizer()
    model.chat_template = template
    check = RowCheck(ChatFormat(model))
    calls = [[{**CALL, "function": {"name": name, "arguments": text}}] for text in ARGUMENTS for name in ("f", "f_g")]
    messages = [
        {"role": "assistant", "tool_calls": called, **more}
        for called in [*calls, calls[2] + calls[4], [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}]]
        for more in ({}, {"content": None}, {"content": ""}, *SAID)
    ]
    quick = [check._shape(message, True) for message in messages]
    assert len(set(quick)) < len(messages), "the case shows nothing"
    monkeypatch.setattr(check, "_calling", lambda message, tools: None)
    closely: dict[Any, Any] = {}
    for shape, message in zip(quick, messages, strict=True):
        assert closely.setdefault(shape, check._shape(message, True)) == check._shape(message, True), message


def test_it_needs_no_torch(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    script = (
        "import sys; from arbor_trl.row_check import row_check; found = row_check(sys.argv[1]); "
        "print(found is not None, sys.modules.get('torch'))"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    assert ran.stdout == "True None\n"


def test_what_others_say_and_is_left_out_is_a_warning(tmp_path: Path) -> None:
    """Once for the file: the template drops system prompts, results of tools, and tools."""
    template = t.HERMES.replace("{% if tools %}", "{% if false %}").replace(
        "{% for m in messages %}", "{% for m in messages if m.role not in ['system', 'tool'] %}"
    )
    system, result = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "18 degrees"}
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    row = {"messages": [system, *CALLING["messages"], result, ANSWER], "tools": tools}
    report = validated(tmp_path, template, [PLAIN, row, row])
    assert report.error is None
    assert [warning.partition(" (")[0] for warning in report.warnings] == [
        f"training_file: the model's chat template leaves out {what}, which is not read"
        for what in ("the list of tools", "what system messages say", "what tool messages say")
    ]
