"""The training file as token sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arbor_trl.chat import ChatFormat, Rendered, Sample

from arbor_core import JobFailed, RowError, canonical, check_chat_row, excerpt_of, read_rows

BATCH = 1000
"""Texts that are tokenised at once."""


@dataclass(frozen=True)
class Samples:
    """The sequences of a file, and how many of them were too long."""

    kept: list[Sample]
    rows: int
    truncated: int = 0
    skipped: int = 0

    @property
    def lengths(self) -> list[int]:
        return [len(sample.ids) for sample in self.kept]


def load(path: Path, chat: ChatFormat, length: int, too_long: Literal["truncate", "skip"], param: str) -> Samples:
    """Read, render, tokenise and shorten.

    Args:
        path: A JSONL file of chat rows.
        chat: Of the model.
        length: Longest sequence, in tokens.
        too_long: What to do with longer ones. One that has no token to learn left is skipped in any case.
        param: The request's field that named the file.

    Raises:
        JobFailed: `invalid_training_file`, with line and excerpt; or more than half of the sequences are too long.
    """
    rows, rendered = 0, []
    for line, texts in _rendered(path, chat, param):
        rows += 1
        rendered += [(line, text) for text in texts]
    samples = []
    for start in range(0, len(rendered), BATCH):
        part = rendered[start : start + BATCH]
        encoded = chat.encode([text for _, text in part])
        samples += [Sample(s.ids, s.labels, line) for (line, _), s in zip(part, encoded, strict=True)]
    return _shortened(samples, rows, length, too_long, param)


def _rendered(path: Path, chat: ChatFormat, param: str) -> Iterator[tuple[int, list[Rendered]]]:
    line, row = 0, dict[str, Any]()
    try:
        for line, row in read_rows(path):
            check_chat_row(row)
            yield line, chat.render(canonical(row))
    except RowError as error:  # says its line itself
        raise _invalid(str(error), param) from None
    except ValueError as error:
        raise _invalid(str(RowError(line, str(error), excerpt_of(row))), param) from None


def _invalid(reason: str, param: str) -> JobFailed:
    return JobFailed(f"{param}: {reason}", code=f"invalid_{param}", param=param)


def _shortened(
    samples: list[Sample], rows: int, length: int, too_long: Literal["truncate", "skip"], param: str
) -> Samples:
    long = [sample for sample in samples if len(sample.ids) > length]
    if len(long) * 2 > len(samples):
        longest = max(long, key=lambda sample: len(sample.ids))
        raise JobFailed(
            f"{param}: {len(long)} of {len(samples)} examples are longer than {length} tokens (the longest has "
            f"{len(longest.ids)}, in line {longest.line}): shorten them, or raise max_length",
            code=f"invalid_{param}",
            param=param,
        )
    if too_long == "skip":
        cut = [sample for sample in samples if len(sample.ids) <= length]
    else:
        cut = [sample.cut(length) for sample in samples]
    kept = [sample for sample in cut if sample.trained]
    if not kept:
        raise JobFailed(f"{param}: no token to learn is left in any example", code=f"invalid_{param}", param=param)
    skipped = len(samples) - len(kept)
    lost = sum(not sample.cut(length).trained for sample in long)
    return Samples(kept, rows, len(long) - lost if too_long == "truncate" else 0, skipped)
