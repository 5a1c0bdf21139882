"""What the validator says of whole files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from message_cases import ANSWER, CALL, FUNCTION, REFUSED, TOOL, USER, calls

from arbor_core.data.rows import MAX_REPORTED
from arbor_core.data.validator import FileCheck, Report, check

CHECK_ROW = "arbor_core.data.rows:check_chat_row"
GOOD = {"messages": [USER, ANSWER]}


def report(tmp_path: Path, rows: list[Any], check_row: str = CHECK_ROW) -> Report:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check(FileCheck(check_row, 10, str(path)))


def refused(tmp_path: Path, rows: list[Any], check_row: str = CHECK_ROW) -> str:
    error = report(tmp_path, rows, check_row).error
    assert error is not None
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    return str(error["message"])


MALFORMED = [name for name in REFUSED if name.startswith(("call", "function-call", "tools"))]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_calls(tmp_path: Path, name: str) -> None:
    row, path = REFUSED[name]
    said = refused(tmp_path, [GOOD] * 10 + [row])
    assert said.startswith("1 line(s) of the training file cannot be used: line 11: ")
    assert f"'{path}'" in said


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([{"role": "system", "content": ""}, USER, ANSWER], id="system"),
        pytest.param([{"role": "user", "content": ""}, ANSWER], id="user"),
        pytest.param([*calls(CALL)[:2], {"role": "tool", "tool_call_id": "call_1", "content": ""}, ANSWER], id="tool"),
    ],
)
def test_empty_content(tmp_path: Path, messages: list[Any]) -> None:
    assert report(tmp_path, [{"messages": messages}] * 10) == Report(rows={"training_file": 10})


def test_refusals(tmp_path: Path) -> None:
    beside = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
    among = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot help with that."}]}
    rows = [{"messages": [USER, answer]} for answer in (beside, among)] * 5
    assert report(tmp_path, rows) == Report(rows={"training_file": 10})


def test_null_weight(tmp_path: Path) -> None:
    nulls = {"weight": None, "name": None, "tool_calls": None, "function_call": None}
    messages = [{**USER, **nulls}, {**ANSWER, **nulls, "weight": 0}, {**USER, **nulls}, {**ANSWER, **nulls}]
    assert report(tmp_path, [{"messages": messages, "tools": None}] * 10) == Report(rows={"training_file": 10})


def test_legacy_functions(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": None, "function_call": FUNCTION}
    row = {"messages": [USER, answer], "functions": [TOOL["function"]]}
    assert report(tmp_path, [row] * 10) == Report(rows={"training_file": 10})
    assert "'functions[0].name'" in refused(tmp_path, [{**row, "functions": [{}]}] * 10)


def test_empty_tool_calls(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {**ANSWER, "tool_calls": []}], "tools": []}] * 10
    assert report(tmp_path, rows) == Report(rows={"training_file": 10})


def test_a_fault_in_many_lines_is_told_once(tmp_path: Path) -> None:
    many, few = {"messages": [*([USER] * 3), {"role": "bot", "content": "x"}]}, {"messages": calls("f()")}
    said = refused(tmp_path, [GOOD, few, *[many] * 4_998, few, {"messages": [{"role": "bot", "content": "x"}]}])
    assert said.startswith("5,001 line(s) of the training file cannot be used: line 2 and 1 more: Invalid 'messages[1]")
    assert said.count("; line ") == 1
    assert "; line 3 and 4,998 more: Invalid 'messages[3].role': Invalid value 'bot'." in said


def test_ten_different_faults_are_told(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": chr(97 + n) * 3, "content": "x"}]} for n in range(14)]
    said = refused(tmp_path, rows * 2)
    assert "'jjj'" in said
    assert "'kkk'" not in said
    assert said.count(" and 1 more: ") == MAX_REPORTED
    assert said.endswith("; and 8 line(s) with other faults")


def test_what_is_said_of_a_fault_is_short(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    rows = [{"messages": [{"role": long, "content": "x"}]}, {**GOOD, long: 1}, {long: 1}]
    found = report(tmp_path, rows)
    assert found.error is not None
    assert len(str(found.error["message"])) < 2000
    assert len("".join(found.warnings)) < 1000


def test_keys_that_nobody_reads_are_warned_of_once(tmp_path: Path) -> None:
    rows = [GOOD, *[{**GOOD, "source": "web"}] * 9, {"messages": [{**USER, "wieght": 0}, ANSWER]}]
    found = report(tmp_path, rows)
    assert found.error is None
    assert found.warnings == [
        "training_file: nobody reads 'source' (9 time(s), first at line 2)",
        "training_file: nobody reads 'messages[].wieght' (1 time(s), first at line 11)",
    ]


def test_warnings_are_few(tmp_path: Path) -> None:
    found = report(tmp_path, [{**GOOD, chr(97 + n) * 3: 1} for n in range(20)])
    assert len(found.warnings) == MAX_REPORTED + 1
    assert found.warnings[-1] == "training_file: and 10 other warning(s)"


def careless(row: dict[str, Any]) -> None:
    """The check of a plugin that trusts its rows."""
    row["messages"][0]["tool_calls"][0].get("function")


def test_a_check_that_breaks_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arbor_core.data.rows.careless", careless, raising=False)
    row = {"messages": [{"tool_calls": [{}]}]}
    said = refused(tmp_path, [row] * 9 + [{"messages": [{"tool_calls": ["f()"]}]}], "arbor_core.data.rows:careless")
    assert "line 10: the check of the training method failed: AttributeError" in said


def unknown(model: str | None) -> None:
    """The look of a plugin at rows for a model that is elsewhere."""


def test_a_model_that_is_not_here_yet_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a job whose rows nobody has seen with its template would look like any other."""
    monkeypatch.setattr("arbor_core.data.rows.unknown", unknown, raising=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    plain = FileCheck(CHECK_ROW, 1, str(path))
    assert check(plain).warnings == []
    found = check(msgspec.structs.replace(plain, model_check="arbor_core.data.rows:unknown", model="org/model"))
    assert (found.rows, found.error) == ({"training_file": 1}, None)
    assert [text.partition(",")[0] for text in found.warnings] == [
        "The rows were not looked at with the model's chat template"
    ]
