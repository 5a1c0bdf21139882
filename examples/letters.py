"""A task for the tiny model that can be learned only by generalising: write a made-up word backwards.

    python examples/letters.py OUT_DIR [SEED]     writes train.jsonl, valid.jsonl and test.jsonl

The split is by word, decided by a checksum of the word itself: a word belongs to one split for ever, so none that is
tested (or validated on) was trained on, whatever the counts and seeds. Words are 3 to 6 random letters; there are about
321 million of them, so that learning them by heart does not help. Most of them are long: a model has to find
each place of a word anew, the first letter of six last of all, and is right about few words before it has.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "valid", "test"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = {3: 1, 4: 1, 5: 2, 6: 6}
"""Of words, and how often each comes, of ten."""
COUNTS: dict[Split, int] = {"train": 16_000, "valid": 128, "test": 256}


def split_of(word: str) -> Split:
    """Of 20 checksums, one is the test's and one the validation's."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(word.encode()) % 20, "train")  # type: ignore[return-value]


def words(split: Split, count: int, seed: int = 0) -> list[str]:
    """Different words of one split."""
    draw = random.Random(f"{seed}-{split}")
    found: dict[str, None] = {}
    while len(found) < count:
        (length,) = draw.choices(list(LENGTHS), list(LENGTHS.values()))
        word = "".join(draw.choices(LETTERS, k=length))
        if split_of(word) == split:
            found[word] = None
    return list(found)


def rows(split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chat rows: the word is the question, the word backwards is the answer."""
    return [
        {"messages": [{"role": "user", "content": f"reverse: {word}"}, {"role": "assistant", "content": word[::-1]}]}
        for word in words(split, count, seed)
    ]


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python examples/letters.py OUT_DIR [SEED]")
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 0
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        lines = [json.dumps(row) + "\n" for row in rows(split, count, seed)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
        print(f"{folder / split}.jsonl: {count} examples")


if __name__ == "__main__":
    main()
