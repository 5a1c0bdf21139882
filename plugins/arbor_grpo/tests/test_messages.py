"""The messages of a group are checked by the rules of training rows and chat completions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from arbor_grpo.api.groups import answer_of, conversation_of
from arbor_grpo.api.requests import Item
from message_cases import ANSWER, CALL, FUNCTION, REFUSED, REFUSED_IN_CHATS, TAKEN, TOOL, USER

from arbor_core import check_chat_row
from arbor_core.http import ApiError, ConfigError, typed


def read(case: dict[str, Any]) -> dict[str, Any]:
    item = typed({"messages": case["messages"], "tools": case.get("tools"), "completion": "x"}, Item, "batch[3]")
    return conversation_of(item, "batch[3]")


@pytest.mark.parametrize("name", REFUSED)
def test_groups_are_refused_like_rows(name: str) -> None:
    case, path = REFUSED[name]
    with pytest.raises((ApiError, ConfigError)) as refused:
        read(case)
    error = refused.value
    assert (error.param if isinstance(error, ApiError) else error.path) == f"batch[3].{path}"
    if isinstance(error, ApiError):
        assert (error.status, error.code) == (400, "invalid_rollout")
        with pytest.raises(ConfigError) as of_row:
            check_chat_row(case)
        assert str(error) == str(of_row.value).replace(f"'{path}'", f"'batch[3].{path}'")


@pytest.mark.parametrize("case", [*TAKEN.values(), *(case for case, _ in REFUSED_IN_CHATS.values())])
def test_groups_may_hold_what_rows_may(case: dict[str, Any]) -> None:
    taken = read(case)
    assert len(taken["messages"]) == len(case["messages"])
    assert not any(value is None for message in taken["messages"] for key, value in message.items() if key != "content")


@pytest.mark.parametrize(
    "completion",
    ["", "x", {"content": ""}, {"content": None}, {"role": None, "content": "x", "tool_calls": []}, {"mood": "good"}],
)
def test_a_completion_may_be_empty(completion: Any) -> None:
    assert answer_of(completion, "batch[0].completion")["role"] == "assistant"


@pytest.mark.parametrize(
    ("completion", "path"),
    [
        ({"role": "user", "content": "x"}, ".role"),
        ({"content": 5}, ".content"),
        ({"content": [{"type": "image_url"}]}, ".content[0].type"),
        ({"tool_calls": ["f()"]}, ".tool_calls[0]"),
        ({"tool_calls": [CALL, FUNCTION]}, ".tool_calls[1].function"),
        ({"function_call": "f"}, ".function_call"),
        ({"content": "x", "mood": [[]] * 3 + [msgspec.json.decode("[" * 70 + "]" * 70)]}, ""),
    ],
)
def test_completions_that_are_no_messages(completion: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiError) as refused:
        answer_of(completion, "batch[0].completion")
    assert (refused.value.code, refused.value.param) == ("invalid_rollout", f"batch[0].completion{path}")


def test_functions_are_tools() -> None:
    item = Item(messages=[USER, ANSWER, USER], completion="x", functions=[TOOL["function"]])
    assert conversation_of(item, "batch[0]")["tools"] == [TOOL]
