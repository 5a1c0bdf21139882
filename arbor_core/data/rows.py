"""Reading training files: JSON lines, one row at a time, with errors that name the line.

Used by the validator (a process of its own, before a job is queued) and by trainers.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.types import ConfigError, JobFailed

from .message_rules import Rules, read_chat_data, read_message
from .messages import AssistantMessage, ChatData

LINE_BYTES = 16 << 20
"""Longest line."""
EXCERPT_CHARS = 120
MAX_REPORTED = 10
LONGEST_NUMBER = 400
"""Digits of a whole number."""
ROW_KEYS = frozenset(ChatData.__struct_fields__)
TRAINING = Rules(learned=True)

Warn = Callable[[int, str], None]


class RowError(ValueError):
    """A line that cannot be used."""

    def __init__(self, line: int, reason: str, excerpt: str = "") -> None:
        super().__init__(f"line {line}: {followed(reason, excerpt)}")
        self.line, self.reason, self.excerpt = line, reason, excerpt


def followed(reason: str, excerpt: str) -> str:
    """A reason and the line that it is about."""
    colon = "" if not excerpt or reason.endswith(".") else ":"
    return f"{reason}{colon} {excerpt}".rstrip()


def read_rows(path: Path, warn: Warn | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers, from 1.

    A byte-order mark, CRLF and blank lines are accepted; of equal keys the last wins, which `warn(line, reason)` hears.

    Raises:
        RowError: a line that is no JSON object, not UTF-8, longer than `LINE_BYTES`, or holds a number that is none of
            JSON's or too large.
    """
    for line, result in parse_lines(path, warn):
        if isinstance(result, RowError):
            raise result
        yield line, result


def parse_lines(path: Path, warn: Warn | None = None) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Like `read_rows`, but a line that cannot be used comes as its `RowError`, and reading goes on."""
    for number, offset, raw in raw_lines(path):
        if len(raw) > LINE_BYTES:
            yield number, RowError(number, f"line too long (more than {LINE_BYTES >> 20} MiB)", excerpt(raw))
            continue
        row = quickly_parsed(raw)
        if row is not None:
            yield number, row
        elif raw.strip():
            yield number, Line(number, raw, offset, warn).parsed()
        elif warn:
            warn(number, "blank line skipped")


def raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file with their numbers, from 1, and the bytes before them, without a byte-order mark. Of one that
    is longer than `LINE_BYTES` one byte more comes, and no more is read at once."""
    with path.open("rb") as file:
        offset, number = 0, 0
        while raw := file.readline(LINE_BYTES + 1):
            number += 1
            start, size = offset, len(raw)
            if number == 1 and raw.startswith(codecs.BOM_UTF8):
                raw, start = raw[len(codecs.BOM_UTF8) :], start + len(codecs.BOM_UTF8)
            yield number, start, raw
            while size > LINE_BYTES and not raw.endswith(b"\n") and (raw := file.readline(LINE_BYTES)):
                offset += len(raw)
            offset += size


def quickly_parsed(raw: bytes) -> dict[str, Any] | None:
    """A line as the JSON object that it plainly is. None: it is none, or has to be looked at more closely."""
    try:
        row = decode(raw)
        # A key that came twice has taken a colon with it. Those in texts are there before and after.
        plain = type(row) is dict and encode(row).count(b":") == raw.count(b":")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return row if plain else None


decode = msgspec.json.Decoder().decode
encode = msgspec.json.Encoder().encode


class Line:
    """A line of a file, to be read with care.

    Args:
        offset: Bytes of the file before it.
        warn: Hears of keys that come twice.
    """

    def __init__(self, number: int, raw: bytes, offset: int, warn: Warn | None) -> None:
        self.number, self.raw, self.offset, self.warn = number, raw, offset, warn

    def parsed(self) -> dict[str, Any] | RowError:
        try:
            text = self.raw.decode()
            if "\0" in text:
                return self.error(f"not UTF-8 text: a NUL byte at byte {self.offset + self.raw.index(0)}", shown=False)
            if text.startswith("\ufeff"):
                return self.error("a byte-order mark, which only a file may begin with")
            row = json.loads(
                text,
                object_pairs_hook=self.object,
                parse_constant=no_number,
                parse_float=finite,
                parse_int=whole,
            )
            if "\\u" in text:
                json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate has no encoding
        except UnicodeDecodeError as error:
            return self.error(f"not UTF-8 at byte {self.offset + error.start}", shown=False)
        except UnicodeEncodeError:
            return self.error("a lone surrogate (\\ud800 to \\udfff) is not text")
        except json.JSONDecodeError as error:
            return self.error(f"not JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            return self.error("nested too deeply")
        except ValueError as error:
            return self.error(str(error))
        return row if isinstance(row, dict) else self.error("expected a JSON object")

    def error(self, reason: str, *, shown: bool = True) -> RowError:
        return RowError(self.number, reason, excerpt(self.raw) if shown else "")

    def object(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items) and self.warn:
            self.warn(self.number, "duplicate keys, the last one wins")
        return found


def no_number(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is too large for a 64-bit float")
    return number


def whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a whole number of more than {LONGEST_NUMBER} digits")
    return int(text)


def excerpt(raw: bytes) -> str:
    """The beginning of a line, for people."""
    text = raw[: 4 * EXCERPT_CHARS].decode(errors="replace").strip()
    return text[:EXCERPT_CHARS] + ("…" if len(text) > EXCERPT_CHARS else "")


def excerpt_of(row: Mapping[str, Any]) -> str:
    """The beginning of a row as JSON, for people."""
    try:
        return excerpt(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
    except RecursionError:
        return ""


def check_chat_row(row: dict[str, Any]) -> list[str]:
    """A row for supervised fine-tuning: `{"messages": [...], "tools"?: [...], "parallel_tool_calls"?: bool}`, and
    `functions` for `tools`.

    Returns:
        Warnings: keys that nobody reads.

    Raises:
        ValueError: saying which key is wrong, and how.
    """
    if "messages" not in row:
        found = ", ".join(repr(key) for key in list(row)[:MAX_REPORTED]) or "nothing"
        raise ConfigError(f"Missing required parameter: 'messages' (found: {found}).", path="messages")
    data, unknown = read_chat_data(row, TRAINING)
    for message in data.messages:
        if type(message) is AssistantMessage and message.weight != 0:
            break
    else:
        raise ValueError("no assistant message to learn from (with a weight other than 0)")
    if not unknown and row.keys() <= ROW_KEYS:
        return []
    return [f"nobody reads '{key}'" for key in [*sorted(row.keys() - ROW_KEYS), *sorted(unknown)]]


def check_message(message: Any, where: str) -> None:
    """One chat message of a training row that is not learned as a whole, of a preference pair for one.

    Raises:
        ValueError: saying which key is wrong, and how; `where` is the message's path.
    """
    read_message(message, where, Rules())


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
