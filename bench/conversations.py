"""How fast rows of many turns become tokens, on one core: questions and answers, and traces of calls.

Processor time of `ROWS` rows of 200 turns, for as many as 2,500 of them, and what twice the turns cost.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from arbor_sft.tiny import tokenizer
from arbor_trl.chat import ChatFormat

ROWS, TURNS, WANTED = 20, 200, 2500
Messages = list[dict[str, Any]]


def talk(turns: int) -> Messages:
    return [
        message
        for at in range(turns)
        for message in (
            {"role": "user", "content": f"observation {at} " + "x" * 400},
            {"role": "assistant", "content": f"action {at} " + "y" * 100},
        )
    ]


def trace(turns: int) -> Messages:
    messages: Messages = [{"role": "user", "content": "Do it."}]
    for at in range(turns):
        function = {"name": "run", "arguments": json.dumps({"command": f"cat {at}", "lines": at})}
        call = {"id": f"call{at:05}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": f"step {at}", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": "line\n" * 80})
    return [*messages, {"role": "assistant", "content": "Done."}]


def seconds(make: Callable[[int], Messages], turns: int) -> float:
    """Of one row."""
    chat = ChatFormat(tokenizer())
    rows = [{"messages": make(turns)} for _ in range(ROWS)]
    start = time.process_time()
    for row in rows:
        chat.encode(chat.render(row))
    return (time.process_time() - start) / ROWS


def main() -> None:
    figures: dict[str, Any] = {}
    for make in (talk, trace):
        once, twice = seconds(make, TURNS), seconds(make, 2 * TURNS)
        figures[make.__name__] = {"seconds": round(once * WANTED, 1), "twice": round(twice / once, 2)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
