"""Conversations that are wrong, and the key that is at fault, for all who take some: training rows, chat requests and
groups of rollouts. Some are wrong for chat requests alone."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

USER: Json = {"role": "user", "content": "Weather in Lima?"}
ANSWER: Json = {"role": "assistant", "content": "It is 18."}
FUNCTION: Json = {"name": "get_weather", "arguments": '{"city": "Lima"}'}
CALL: Json = {"id": "call_1", "type": "function", "function": FUNCTION}
TOOL: Json = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def calls(*calls: Any) -> list[Json]:
    return [USER, {"role": "assistant", "content": None, "tool_calls": list(calls)}, ANSWER]


def said(**message: Any) -> list[Json]:
    return [USER, {"role": "assistant", **message}, ANSWER]


REFUSED: dict[str, tuple[Json, str]] = {
    "calls-text": ({"messages": calls("get_weather(Lima)")}, "messages[1].tool_calls[0]"),
    "calls-null": ({"messages": calls(None)}, "messages[1].tool_calls[0]"),
    "calls-flat": ({"messages": calls({"name": "f", "arguments": {}})}, "messages[1].tool_calls[0].function"),
    "call-without-name": (
        {"messages": calls(CALL, {"id": "2", "function": {"arguments": "{}"}})},
        "messages[1].tool_calls[1].function.name",
    ),
    "call-without-arguments": (
        {"messages": calls({"id": "2", "function": {"name": "f"}})},
        "messages[1].tool_calls[0].function.arguments",
    ),
    "call-of-another-type": ({"messages": calls({**CALL, "type": "custom"})}, "messages[1].tool_calls[0].type"),
    "arguments-number": (
        {"messages": calls({"id": "2", "function": {"name": "f", "arguments": 5}})},
        "messages[1].tool_calls[0].function.arguments",
    ),
    "calls-object": ({"messages": said(tool_calls={"0": CALL})}, "messages[1].tool_calls"),
    "calls-of-a-user": ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "messages[0].tool_calls"),
    "function-call-text": ({"messages": said(function_call="get_weather")}, "messages[1].function_call"),
    "function-call-list": ({"messages": said(function_call=[FUNCTION])}, "messages[1].function_call"),
    "tools-empty": ({"messages": [USER, ANSWER], "tools": [{}]}, "tools[0].function"),
    "tools-flat": ({"messages": [USER, ANSWER], "tools": [{"type": "function", "name": "f"}]}, "tools[0].function"),
    "tools-text": ({"messages": [USER, ANSWER], "tools": "get_weather"}, "tools"),
    "tools-without-name": ({"messages": [USER, ANSWER], "tools": [{"function": {}}]}, "tools[0].function.name"),
    "content-null": ({"messages": [{**USER, "content": None}, ANSWER]}, "messages[0].content"),
    "content-none": ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content"),
    "content-of-a-tool-null": (
        {"messages": [USER, {"role": "tool", "tool_call_id": "1", "content": None}, ANSWER]},
        "messages[1].content",
    ),
    "content-of-an-assistant-null": ({"messages": said(content=None)}, "messages[1].content"),
    "content-number": ({"messages": [{**USER, "content": 5}, ANSWER]}, "messages[0].content"),
    "content-image": (
        {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
        "messages[0].content[0].type",
    ),
    "content-part-text": ({"messages": [{**USER, "content": ["x"]}, ANSWER]}, "messages[0].content[0]"),
    "refusal-of-a-user": ({"messages": [{**USER, "refusal": "no"}, ANSWER]}, "messages[0].refusal"),
    "refusal-number": ({"messages": said(refusal=5)}, "messages[1].refusal"),
    "role": ({"messages": [{"role": "bot", "content": "x"}, ANSWER]}, "messages[0].role"),
    "no-role": ({"messages": [{"content": "x"}, ANSWER]}, "messages[0].role"),
    "message-text": ({"messages": ["x", ANSWER]}, "messages[0]"),
    "weight-of-a-user": ({"messages": [{**USER, "weight": 0}, ANSWER]}, "messages[0].weight"),
    "weight-2": ({"messages": said(content="x", weight=2)}, "messages[1].weight"),
    "weight-half": ({"messages": said(content="x", weight=0.5)}, "messages[1].weight"),
    "weight-true": ({"messages": said(content="x", weight=True)}, "messages[1].weight"),
    "name-number": ({"messages": [{**USER, "name": 5}, ANSWER]}, "messages[0].name"),
    "function-without-name": ({"messages": [USER, {"role": "function", "content": "x"}, ANSWER]}, "messages[1].name"),
}
"""Wrong, whoever sends it."""

REFUSED_IN_CHATS: dict[str, tuple[Json, str]] = {
    "call-without-id": (
        {"messages": calls({"type": "function", "function": FUNCTION})},
        "messages[1].tool_calls[0].id",
    ),
    "arguments-object": (
        {"messages": calls({"id": "1", "function": {"name": "f", "arguments": {"city": "Lima"}}})},
        "messages[1].tool_calls[0].function.arguments",
    ),
    "tool-without-id": (
        {"messages": [USER, {"role": "tool", "content": "18"}, ANSWER]},
        "messages[1].tool_call_id",
    ),
    "unknown-key": ({"messages": [{**USER, "mood": "good"}, ANSWER]}, "messages[0].mood"),
}
"""Wrong in chat requests, and usual in data for training."""

KEYS = ("name", "weight", "refusal", "tool_calls", "function_call", "tool_call_id", "audio", "annotations")
NULLS: Json = dict.fromkeys(KEYS)
EMPTY = {"tool_calls": [], "annotations": []}
TAKEN: dict[str, Json] = {
    "plain": {"messages": [USER, ANSWER]},
    "nulls": {"messages": [{**NULLS, **USER}, {**NULLS, **ANSWER}], "tools": None, "functions": None},
    "nulls-of-unknown-keys": {"messages": [{"mood": None, **USER}, {"mood": None, **ANSWER}]},
    "empty-lists": {"messages": [{**EMPTY, **USER}, {**EMPTY, **ANSWER}], "tools": []},
    "empty-system": {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
    "empty-user": {"messages": [{"role": "user", "content": ""}, ANSWER]},
    "empty-tool": {
        "messages": [*calls(CALL)[:2], {"role": "tool", "tool_call_id": "call_1", "content": ""}, ANSWER],
        "tools": [TOOL],
    },
    "refusal": {"messages": [USER, {"role": "assistant", "content": None, "refusal": "No."}]},
    "refusal-part": {
        "messages": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
    },
    "refusal-among-text": {
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "text", "text": "Hm."}, {"type": "refusal", "refusal": "No."}]},
        ],
    },
    "thoughts": {"messages": [USER, {**ANSWER, "reasoning_content": "Warm there.", "name": "clerk"}]},
    "assistant-first": {"messages": [{"role": "assistant", "content": "Welcome!"}, USER, ANSWER]},
    "weight-0": {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1.0}]},
    "function-call": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": FUNCTION},
            {"role": "function", "name": "get_weather", "content": None},
            ANSWER,
        ]
    },
}
"""Without a fault, whoever sends it."""
