"""Reading training files: JSON lines, one row at a time, with errors that name the line.

Used by the validator (a process of its own, before a job is queued) and by trainers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arbor_core.storage.codec import check_depth
from arbor_core.types import JobFailed

LINE_BYTES = 16 << 20
"""Longest line."""
EXCERPT_CHARS = 120
MAX_REPORTED = 10
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

Warn = Callable[[int, str], None]


class RowError(ValueError):
    """A line that cannot be used."""

    def __init__(self, line: int, reason: str, excerpt: str = "") -> None:
        super().__init__(f"line {line}: {reason}" + (f": {excerpt}" if excerpt else ""))
        self.line = line


def read_rows(path: Path, warn: Warn | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers, from 1.

    A byte-order mark, CRLF and blank lines are accepted; of equal keys the last wins, which `warn(line, reason)` hears.

    Raises:
        RowError: a line that is no JSON object, not UTF-8, longer than `LINE_BYTES`, or holds NaN or Infinity.
    """
    for line, result in parse_lines(path, warn):
        if isinstance(result, RowError):
            raise result
        yield line, result


def parse_lines(path: Path, warn: Warn | None = None) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Like `read_rows`, but a line that cannot be used comes as its `RowError`, and reading goes on."""
    offset = 0
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LINE_BYTES + 1):
            number += 1
            if len(raw) > LINE_BYTES:
                yield number, RowError(number, f"line too long (more than {LINE_BYTES >> 20} MiB)", excerpt(raw))
                return
            text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if text.strip():
                yield number, _parse(number, text, offset + len(raw) - len(text), warn)
            elif warn:
                warn(number, "blank line skipped")
            offset += len(raw)


def _parse(number: int, raw: bytes, offset: int, warn: Warn | None) -> dict[str, Any] | RowError:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items) and warn:
            warn(number, "duplicate keys, the last one wins")
        return found

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        text = raw.decode()
        if "\0" in text:
            return RowError(number, f"not UTF-8 text: a NUL byte at byte {offset + raw.index(0)}")
        row = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate has no encoding
    except UnicodeDecodeError as error:
        return RowError(number, f"not UTF-8 at byte {offset + error.start}")
    except UnicodeEncodeError:
        return RowError(number, "a lone surrogate (\\ud800 to \\udfff) is not text", excerpt(raw))
    except json.JSONDecodeError as error:
        return RowError(number, f"not JSON ({error.msg} at column {error.colno})", excerpt(raw))
    except RecursionError:
        return RowError(number, "nested too deeply", excerpt(raw))
    except ValueError as error:
        return RowError(number, str(error), excerpt(raw))
    return row if isinstance(row, dict) else RowError(number, "expected a JSON object", excerpt(raw))


def excerpt(raw: bytes) -> str:
    """The beginning of a line, for people."""
    text = raw[: 4 * EXCERPT_CHARS].decode(errors="replace").strip()
    return text[:EXCERPT_CHARS] + ("…" if len(text) > EXCERPT_CHARS else "")


def check_chat_row(row: dict[str, Any]) -> None:
    """A row for supervised fine-tuning: `{"messages": [...], "tools"?: [...], "parallel_tool_calls"?: bool}`.

    Raises:
        ValueError: saying which message is wrong, and how.
    """
    if "messages" not in row:
        raise ValueError(f"missing 'messages' (found: {', '.join(map(repr, row)) or 'nothing'})")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of at least one message")
    for index, message in enumerate(messages):
        check_message(message, f"messages[{index}]")
    trained = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1) != 0]
    if not trained:
        raise ValueError("no assistant message to learn from (with a weight other than 0)")
    if not isinstance(row.get("tools", []) or [], list):
        raise ValueError("'tools' must be a list")


def check_message(message: Any, where: str) -> None:
    """One chat message of a training row."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object")
    check_depth(message, where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r}; expected one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and (role != "assistant" or not isinstance(calls, list)):
        raise ValueError(f"{where}.tool_calls must be a list, on an assistant message")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise ValueError(f"{where}.content has a part that is not text; this method trains on text only")
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where}.content must be text")
    if not content and not calls and not message.get("function_call"):
        raise ValueError(f"{where}.content is empty")
    weight = message.get("weight", 1)
    if "weight" in message and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"{where}.weight must be 0 or 1, on an assistant message")


def require_rows(count: int, minimum: int, param: str) -> None:
    """Fail a job whose file is too short.

    Raises:
        JobFailed: `invalid_n_examples`.
    """
    if count < minimum:
        name = param.replace("_", " ").capitalize()
        raise JobFailed(
            f"{name} has {count} example(s), but must have at least {minimum} examples",
            code="invalid_n_examples",
            param=param,
        )
