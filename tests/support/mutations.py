"""Training files with a fault or two: valid rows in which types are swapped, keys dropped, bytes broken."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from message_cases import ANSWER, CALL, FUNCTION, TOOL, USER

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]},
    {"messages": [USER, {**ANSWER, "weight": 0, "name": None}, USER, {**ANSWER, "weight": 1}], "tools": None},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 18}'},
            {**ANSWER, "reasoning_content": "Mild."},
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    },
    {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            USER,
            {"role": "assistant", "function_call": FUNCTION},
            {"role": "function", "name": "get_weather", "content": "18"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ],
        "functions": [TOOL["function"]],
    },
]
ARGUMENTS = [
    *("{", "", "[1]", "NaN", '{"a": "\\ud800"}', '{"\\udfff": 1}', '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}"),
    *(f'{{"a": {"[" * depth}{"]" * depth}}}' for depth in (58, 62, 900)),
    *({"a": json.loads("[" * depth + "]" * depth)} for depth in (57, 58, 59, 60, 62)),
]
"""Of calls; most are no faults, because a model may have written them."""
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 10**30, -(2**63) - 1, 1e308, "", "x", "assistant", "\x00", "\U0001f600", "{}"),
    *([], {}, [None], ["x"], [[]], [{}], {"": None}, {"role": "user"}, {"type": "text"}, {"a": {"b": [1]}}, "x" * 3000),
    *([{"type": "text", "text": None}], [{"type": "image_url"}], {"name": "f"}, {"name": "f", "arguments": []}),
    *(
        [CALL, None],
        {"function": None},
        [{"function": {"name": "", "arguments": "{"}}],
        json.loads("[" * 80 + "]" * 80),
    ),
]
KEYS = [
    "",
    "role",
    "content",
    "tool_calls",
    "function_call",
    "weight",
    "name",
    "refusal",
    "tools",
    "annotations",
    "mood",
]
TEXTS = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    '"\\udc00\\ud83d"',
    "[" * 1500 + "]" * 1500,
    '"a',
    "'a'",
    "01",
]


def mutated(random: Random) -> bytes:
    """A file of twelve rows, most of them valid."""
    rows = [copy.deepcopy(random.choice(ROWS)) for _ in range(12)]
    for _ in range(random.choice((0, 1, 1, 1, 2))):
        change(random.choice(rows), random)
    separators = random.choice(((", ", ": "), (",", ":"), (" ,\t", " : ")))
    lines = [json.dumps(row, ensure_ascii=random.random() < 0.5, separators=separators).encode() for row in rows]
    for _ in range(random.choice((0, 0, 1, 2))):
        index = random.randrange(len(lines))
        lines[index] = random.choice(LINES)(lines[index], random)
    return random.choice(FILES)(lines, random)


def change(row: dict[str, Any], random: Random) -> None:
    """One place of a row is another value, gone, or somewhere else."""
    places = list(places_of(row)) or [({"messages": None}, "messages")]
    holder, key = random.choice(places)
    kind = random.randrange(6)
    called = [place for place in places if place[1] in ("arguments", "parameters")]
    if kind == 5 and called:
        holder, key = random.choice(called)
        holder[key] = copy.deepcopy(random.choice(ARGUMENTS))
        return
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(KEYS)] = holder.pop(key)
    elif kind == 2:
        other, from_key = random.choice(places)
        holder[key] = copy.deepcopy(other[from_key])
    elif kind == 3 and isinstance(holder, dict):
        holder[random.choice(KEYS)] = copy.deepcopy(random.choice(VALUES))
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))


def places_of(value: Any) -> Any:
    """Every place in a value: what holds it, and its key or index."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places_of(value[key])


def scalar(line: bytes, random: Random) -> bytes:
    """One text of the line is something that JSON cannot say, or nobody can use."""
    parts = line.split(b'"')
    at = random.randrange(len(parts))
    return b'"'.join([*parts[:at], random.choice(TEXTS).encode(), *parts[at + 1 :]])


def flipped(line: bytes, random: Random) -> bytes:
    at = random.randrange(len(line) + 1)
    return line[:at] + random.randbytes(random.choice((1, 1, 4))) + line[at + random.choice((0, 1)) :]


LINES: list[Callable[[bytes, Random], bytes]] = [
    scalar,
    flipped,
    lambda line, random: line[: random.randrange(len(line) + 1)],
    lambda line, random: line + line,
    lambda line, random: b"",
    lambda line, random: b" \t" + line + b"\r",
    lambda line, random: b"[" + line + b"]",
    lambda line, random: line.replace(b'{"role"', b'{"role": "user", "role"', 1),
    lambda line, random: line.replace(b'"content"', b'"content": null, "content"', 1),
    lambda line, random: b'{"a": 1, ' + line[1:],
    lambda line, random: random.choice(TEXTS).encode(),
]
FILES: list[Callable[[list[bytes], Random], bytes]] = [
    *[lambda lines, random: b"\n".join(lines) + b"\n"] * 12,
    lambda lines, random: b"\r\n".join(lines),
    lambda lines, random: b"\xef\xbb\xbf" + b"\n\n".join(lines),
    lambda lines, random: b"\n".join(lines).decode(errors="replace").encode("utf-16"),
    lambda lines, random: b"",
    lambda lines, random: b"\n" * 20,
    lambda lines, random: b" ".join(lines),
    lambda lines, random: b"\n".join(lines)[: -random.randrange(1, 200)],
    lambda lines, random: b"\xef\xbb\xbf\xef\xbb\xbf" + b"\n".join(lines),
]
