"""From the lines of a file to tokens: what was checked before the job was queued is what a trainer can use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

pytestmark = pytest.mark.ml
pytest.importorskip("transformers", reason="needs the machine-learning libraries")

# ruff: noqa: E402
from arbor_sft.rows import load
from arbor_sft.tiny import tokenizer
from arbor_trl.chat import IGNORED, ChatFormat
from message_cases import ANSWER, CALL, FUNCTION, TAKEN, TOOL, USER
from mutations import mutated

from arbor_core import JobFailed
from arbor_core.data.validator import FileCheck, Report, check

CHECK_ROW = "arbor_core.data.rows:check_chat_row"
MODEL_CHECK = "arbor_trl.row_check:row_check"
PYTHON = re.compile(
    r"[A-Z][a-z]+Error|NoneType|object has no|not (subscriptable|iterable|hashable)|unhashable|sys\.|utf-8-sig"
)
"""Words of Python's that mean nothing to those who send data."""


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(tokenizer())


def tokens(tmp_path: Path, chat: ChatFormat, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and labels of a row that was checked."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert check(FileCheck(CHECK_ROW, 1, str(path))).error is None
    (sample,) = load(path, chat, 10_000, "truncate", "training_file").kept
    return sample.ids, sample.labels


def learned(tmp_path: Path, chat: ChatFormat, row: dict[str, Any]) -> str:
    _, labels = tokens(tmp_path, chat, row)
    return str(chat.tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_validator_takes_is_trained(tmp_path: Path, chat: ChatFormat, name: str) -> None:
    assert learned(tmp_path, chat, TAKEN[name])


def test_null_weight(tmp_path: Path, chat: ChatFormat) -> None:
    nulls = {"weight": None, "name": None, "tool_calls": None}
    row = {"messages": [{**USER, **nulls}, {**ANSWER, **nulls, "weight": 0}, {**USER, **nulls}, {**ANSWER, **nulls}]}
    plain = {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}
    assert tokens(tmp_path, chat, row) == tokens(tmp_path, chat, plain)
    table = [{**TOOL, "custom": None, "function": {**TOOL["function"], "description": None, "strict": None}}]
    assert tokens(tmp_path, chat, {**row, "tools": table}) == tokens(tmp_path, chat, {**plain, "tools": [TOOL]})


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "refusal": "I cannot help with that."},
        {"content": "", "refusal": "I cannot help with that."},
        {"content": [{"type": "refusal", "refusal": "I cannot help with that."}]},
        {"content": [{"type": "text", "text": "I cannot "}, {"type": "refusal", "refusal": "help with that."}]},
        {"content": "I cannot help with that. Sorry.", "refusal": "I cannot help with that."},
        {"content": "I cannot help with that.", "refusal": "Not ever."},
    ],
    ids=["beside", "beside-nothing", "among", "after-text", "in-text", "beside-text"],
)
def test_refusals(tmp_path: Path, chat: ChatFormat, answer: dict[str, Any]) -> None:
    row = {"messages": [USER, {"role": "assistant", **answer}]}
    said = learned(tmp_path, chat, row)
    assert said.startswith("I cannot help with that.")
    assert said.count("I cannot") == 1
    assert str(answer.get("refusal", "")) in said


def test_legacy_functions(tmp_path: Path, chat: ChatFormat) -> None:
    former = {"role": "assistant", "content": None, "function_call": FUNCTION}
    present = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    rows = (
        {"messages": [USER, former], "functions": [TOOL["function"]]},
        {"messages": [USER, present], "tools": [TOOL]},
    )
    old, new = (tokens(tmp_path, chat, row) for row in rows)
    assert old == new
    bare = tokens(tmp_path, chat, {"messages": [USER, present]})
    assert len(bare[0]) < len(new[0]), "tools are in the prompt"


def test_empty_tool_calls(tmp_path: Path, chat: ChatFormat) -> None:
    row = {"messages": [USER, {**ANSWER, "tool_calls": []}], "tools": [], "functions": []}
    assert tokens(tmp_path, chat, row) == tokens(tmp_path, chat, {"messages": [USER, ANSWER]})


def test_empty_content(tmp_path: Path, chat: ChatFormat) -> None:
    row = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}, ANSWER]}
    assert learned(tmp_path, chat, row).startswith("It is 18.")


def agrees(path: Path, model: Path, chat: ChatFormat) -> Report:
    """What the validator says of a file. A trainer says the same, and neither says it in Python's words."""
    report = check(FileCheck(CHECK_ROW, 10, str(path), None, MODEL_CHECK, str(model)))
    msgspec.json.encode(report)  # as it leaves its process
    said = " ".join([*report.warnings, report.error["message"] if report.error else ""])
    assert not PYTHON.search(said), said
    if report.error:
        assert report.error["code"] in ("invalid_training_file", "invalid_n_examples"), report.error
    refused = refusal(path, chat)
    assert not PYTHON.search(refused), refused
    assert report.error or not refused, f"the validator took it: {refused}"
    assert refused or not report.error or report.error["code"] == "invalid_n_examples", report.error
    return report


def refusal(path: Path, chat: ChatFormat) -> str:
    """What a trainer fails a job with that learns from a file, or nothing. Any other exception is a `worker_error`."""
    try:
        load(path, chat, 20_000, "truncate", "training_file")
    except JobFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_files_with_faults(tmp_path: Path, tiny: Path, chat: ChatFormat, count: int) -> None:
    random, path = Random(count), tmp_path / "rows.jsonl"
    taken = 0
    for _ in range(count):
        raw = mutated(random)
        path.write_bytes(raw)
        try:
            taken += agrees(path, tiny, chat).error is None
        except BaseException:
            (tmp_path / "at-fault.jsonl").write_bytes(raw)
            raise
    assert count / 10 < taken < count * 9 / 10, "most files have a fault, and some that nobody minds"


def test_one_giant_line(tmp_path: Path, tiny: Path, chat: ChatFormat) -> None:
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"messages": [USER, ANSWER]}).encode()
    path.write_bytes(line + b"\n" + b'{"messages": "' + b"x" * (40 << 20) + b'"}\n' + line)
    error = agrees(path, tiny, chat).error
    assert error is not None
    assert "1 line(s) of the training file cannot be used: line 2: line too long" in error["message"]
