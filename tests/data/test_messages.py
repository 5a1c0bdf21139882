"""One set of rules for messages: what training rows and chat requests answer to the same conversations."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import pytest
from message_cases import ANSWER, CALL, FUNCTION, REFUSED, REFUSED_IN_CHATS, TAKEN, TOOL, USER
from mutations import ROWS, change

from arbor_core.application.chat_request import read_chat
from arbor_core.data.marks import Marks
from arbor_core.data.message_rules import canonical
from arbor_core.data.rows import check_chat_row
from arbor_core.types import ApiError, ConfigError


def chat(case: dict[str, Any]) -> None:
    read_chat(json.dumps({"model": "m", **case}).encode())


@pytest.mark.parametrize("name", REFUSED)
def test_rows_and_requests_are_refused_in_the_same_words(name: str) -> None:
    case, path = REFUSED[name]
    with pytest.raises(ConfigError) as of_request:
        chat(case)
    with pytest.raises(ConfigError) as of_row:
        check_chat_row(case)
    assert of_row.value.path == of_request.value.path == path
    assert str(of_row.value) == str(of_request.value)
    assert f"'{path}'" in str(of_row.value)


@pytest.mark.parametrize("name", REFUSED_IN_CHATS)
def test_rows_may_lack_what_requests_must_have(name: str) -> None:
    case, path = REFUSED_IN_CHATS[name]
    with pytest.raises(ConfigError) as refused:
        chat(case)
    assert refused.value.path == path
    check_chat_row(case)


@pytest.mark.parametrize("name", TAKEN)
def test_rows_and_requests_take_what_openai_takes(name: str) -> None:
    case = TAKEN[name]
    assert check_chat_row(case) == []
    chat(case)


@pytest.mark.parametrize(
    "message",
    [
        {"content": ""},
        {"content": []},
        {"content": [{"type": "text", "text": ""}]},
        {"content": None, "tool_calls": []},
    ],
)
def test_an_assistant_that_is_learned_says_something(message: dict[str, Any]) -> None:
    silent = {"role": "assistant", **message}
    chat({"messages": [USER, silent, USER]})
    check_chat_row({"messages": [USER, {**silent, "weight": 0}, USER, ANSWER]})
    with pytest.raises(ConfigError, match=r"'messages\[1\].content': it is empty"):
        check_chat_row({"messages": [USER, silent, USER, ANSWER]})


def test_canonical_messages_have_no_nulls_and_no_former_names() -> None:
    call = {"type": "function", "function": FUNCTION}
    former = {"role": "assistant", "content": None, "function_call": FUNCTION, "name": None, "tool_calls": []}
    told = {"role": "user", "content": "a", "mood": "good", "tool_calls": None, "annotations": []}
    row = {"messages": [told, former, {"role": "assistant", "tool_calls": [{**CALL, "index": 0}]}], "source": "web"}
    assert canonical({**row, "functions": [TOOL["function"]], "tools": []}) == {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ],
        "tools": [TOOL],
    }
    assert canonical({**row, "functions": []})["tools"] is None


def refusal_of(read: Callable[[dict[str, Any]], object], case: dict[str, Any]) -> ConfigError | None:
    """What a reader says of a conversation; whatever else it raises is a fault of its own."""
    try:
        read(case)
    except ConfigError as error:
        return error
    except ApiError as error:
        return ConfigError(str(error), path=error.param, code=error.code)
    return None


def row(case: dict[str, Any]) -> None:
    try:
        check_chat_row(case)
        canonical(case)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


STRICTER = re.compile(r"\.id'|tool_call_id'|arguments'|Unknown parameter|Unsupported parameter")
LEARNED = re.compile("no assistant message|it is empty")


def test_whatever_is_wrong_with_a_conversation_both_say_so() -> None:
    random, taken = Random(7), 0
    for _ in range(1500):
        case = deepcopy(random.choice(ROWS[:3]))
        for _ in range(random.choice((1, 1, 2))):
            change(case, random)
        of_row, of_request = refusal_of(row, case), refusal_of(chat, case)
        taken += of_row is None
        if of_row is None and of_request is not None:
            assert STRICTER.search(str(of_request)), f"{of_request}: {case}"
        if of_request is None and of_row is not None:
            assert LEARNED.search(str(of_row)), f"{of_row}: {case}"
    assert 100 < taken < 1000


def test_thoughts_under_two_names_are_the_same_or_refused() -> None:
    def row(**thoughts: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **thoughts}]}

    check_chat_row(row(reasoning_content="c", reasoning="c"))
    with pytest.raises(ConfigError, match=r"'messages\[1\].thinking' is another name of") as refused:
        check_chat_row(row(reasoning_content="c", thinking="d"))
    assert refused.value.code == "conflicting_parameters"


def test_looking_for_what_was_said_takes_time_in_line_with_the_messages() -> None:
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": "a"}] * 20_000
    marks = Marks(messages)
    found = marks.find("".join(message["content"] for message in marks.messages))
    began = time.process_time()
    assert not any(marks.missing(index, found, 0, len(found.text)) for index in range(len(messages)))
    assert time.process_time() - began < 5  # it takes 0.1; with the square of the messages it took minutes
