"""Reading and checking training files."""

import json

import pytest

from arbor_core.data.rows import RowError, check_chat_row, parse_lines, read_rows

CALL = {"name": "f", "arguments": "{}"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
DEEP = json.loads("[" * 64 + "]" * 64)
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(tmp_path, raw: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw)
    return path


def test_row_4_a_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path):
    warnings = []
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa9"}')
    rows = list(read_rows(path, lambda line, reason: warnings.append((line, reason))))
    assert rows == [(1, {"a": 1}), (4, {"a": "é"})]
    assert warnings == [(2, "blank line skipped"), (3, "blank line skipped")]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        pytest.param(b'{"a": 1', "line 2: not JSON", id="row-2"),
        pytest.param(b'["a"]', "expected a JSON object", id="row-2-array"),
        pytest.param(b'{"a": "\xff"}', "not UTF-8 at byte 16", id="row-5"),
        pytest.param('{"a": 1}'.encode("utf-16"), "not UTF-8", id="row-5-utf-16"),
        pytest.param(b'{"a": "\x00"}', "NUL", id="row-5-nul"),
        pytest.param(b'{"a": NaN}', "NaN is not JSON", id="row-6-nan"),
        pytest.param(b'{"a": -Infinity}', "-Infinity is not JSON", id="row-6-infinity"),
        pytest.param(b'{"a": "\\ud800"}', "surrogate", id="row-6-surrogate"),
        pytest.param(b'{"a": 1e999}', "too large", id="row-6-large"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "more than 400 digits", id="row-6-digits"),
        pytest.param(b'{"a": ' + b"[" * 100_000, "nested too deeply", id="row-8"),
        pytest.param(b'{"a": "' + b"x" * (17 << 20) + b'"}', "line too long", id="row-7"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, raw, says):
    path = write(tmp_path, b'{"a": 1}\n' + raw + b"\n")
    with pytest.raises(RowError, match=says) as caught:
        list(read_rows(path))
    assert caught.value.line == 2
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"b": {"a": 1, "a": 2}, "c": "x"}', {"b": {"a": 2}, "c": "x"}),
        (b'{"b": [[{"a": 1, "a": 2}]], "c": "\\": \\":"}', {"b": [[{"a": 2}]], "c": '": ":'}),
        (b'{"a": {"b": 1}, "a": 2}', {"a": 2}),
    ],
)
def test_row_6_of_equal_keys_the_last_wins(tmp_path, raw, row):
    warnings = []
    path = write(tmp_path, raw)
    assert list(read_rows(path, lambda line, reason: warnings.append(reason))) == [(1, row)]
    assert warnings == ["duplicate keys, the last one wins"]


def test_texts_that_look_like_keys_are_no_keys_that_come_twice(tmp_path):
    row = {"a": 'she said: "no": and "a": "b"', "b": [{"c": {"d": '\\": 5'}}], "e": 2**70}
    path = write(tmp_path, json.dumps(row).encode())
    assert list(read_rows(path, lambda line, reason: pytest.fail(reason))) == [(1, row)]


def test_reading_goes_on_after_a_bad_line(tmp_path):
    long = b'{"a": "' + b"x" * (17 << 20) + b'"}\n'
    path = write(tmp_path, b'{"a": 1}\nbad\n' + long + b'{"a": 4}\n{"a": "\xff"}')
    rows = list(parse_lines(path))
    assert [line for line, row in rows if isinstance(row, dict)] == [1, 4]
    last = rows[-1][1]
    assert isinstance(last, RowError)
    assert f"byte {9 + 4 + len(long) + 9 + 7}" in str(last)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {**GOOD, "tools": [], "parallel_tool_calls": False},
        {"messages": [*GOOD["messages"], {"role": "assistant", "content": "c", "weight": 0}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": CALL, "type": "function"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "hi"}]}]},
    ],
)
def test_good_rows(row):
    assert check_chat_row(row) == []


def test_keys_that_nobody_reads_are_warned_of():
    said = [{"role": "user", "content": "a", "wieght": 0, "mood": None}, GOOD["messages"][1]]
    assert check_chat_row({"source": "web", "messages": said}) == [
        "nobody reads 'source'",
        "nobody reads 'messages[].wieght'",
    ]


def messages(*pairs: tuple) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        pytest.param({"input": {}, "preferred_output": []}, "found: 'input', 'preferred_output'", id="row-61"),
        pytest.param({"messages": []}, "length >= 1", id="row-61-empty"),
        pytest.param({"messages": "hi"}, "Expected `array`", id="row-61-text"),
        pytest.param({"messages": ["hi"]}, r"'messages\[0\]': Expected `object`", id="row-61-message"),
        pytest.param(messages(("user", "a")), "no assistant", id="row-62-no-assistant"),
        pytest.param(messages(("robot", "a")), "Invalid value 'robot'. Expected", id="row-62-role"),
        pytest.param(
            messages(("user", "a"), ("assistant", "")), r"'messages\[1\].content': it is empty", id="row-62-empty"
        ),
        pytest.param(messages(("user", 3), ("assistant", "b")), "content.: Expected `str", id="row-62-number"),
        pytest.param(
            messages(("user", [{"type": "image_url"}]), ("assistant", "b")),
            "Invalid value .image_url",
            id="row-62-image",
        ),
        pytest.param(
            {"messages": [{"role": "assistant", "content": "b", "weight": 0}]}, "no assistant", id="row-62-weight-0"
        ),
        pytest.param({"messages": [{"role": "assistant", "content": "b", "weight": 2}]}, "weight", id="row-62-weight"),
        pytest.param({**GOOD, "tools": "all"}, "tools", id="row-62-tools"),
        pytest.param(
            {**GOOD, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": DEEP}}}]},
            r"'tools\[0\]': it is nested more than 64 deep",
            id="row-8-tool",
        ),
        pytest.param(
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": DEEP}}}]}
                ]
            },
            r"arguments': it is nested more than 64 deep",
            id="row-8-arguments",
        ),
        pytest.param({**GOOD, "tools": TOOLS, "functions": [{"name": "f"}]}, "give only 'tools'", id="row-62-both"),
    ],
)
def test_rows_that_supervised_fine_tuning_cannot_use(row, says):
    with pytest.raises(ValueError, match=says):
        check_chat_row(json.loads(json.dumps(row)))
