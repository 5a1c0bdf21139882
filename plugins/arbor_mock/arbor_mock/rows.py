"""Rows of training files of all three methods: the mock learns from none, and refuses what a real one would."""

from typing import Any

from arbor_core import check_chat_row, check_message

CHAT_KEYS = {"messages", "tools", "parallel_tool_calls", "functions"}


def check_row(row: dict[str, Any]) -> list[str]:
    """Check one row: a preference pair, a prompt with `item` fields for a grader, or a chat. Returns warnings.

    Raises:
        ValueError: saying what is wrong where.
    """
    if "preferred_output" in row or "non_preferred_output" in row:
        given = row.get("input")
        _messages(given.get("messages") if isinstance(given, dict) else None, "input.messages")
        _messages(row.get("preferred_output"), "preferred_output")
        _messages(row.get("non_preferred_output"), "non_preferred_output")
    elif _is_prompt(row):
        _messages(row["messages"], "messages")
    else:
        return check_chat_row(row)
    return []


def _is_prompt(row: dict[str, Any]) -> bool:
    """Whether a row asks for an answer and holds something to grade it by."""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") in ("user", "developer") and bool(set(row) - CHAT_KEYS)


def _messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{where}' must be a list of at least one message")
    for index, message in enumerate(messages):
        check_message(message, f"{where}[{index}]")


def words(row: dict[str, Any]) -> int:
    """How many words of a row would be trained on."""
    messages = row.get("preferred_output") or row.get("messages", [])
    return sum(len(_text(m).split()) for m in messages if m["role"] == "assistant" and m.get("weight", 1) != 0)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
