"""How fast training files are checked, on one core: rows of 300 bytes, and rows of 4 kB of plain messages, of text with
quotes and of calls.

Once by the rules for messages alone (`mb_per_second`), and once with a look at what the tiny model's chat template
makes of each row (`with_template`), as jobs are checked.

The figure is megabytes a second of processor time, the best of several runs, because the machine is shared. `memory_mb`
is what a process needs for a file of 200 MB beyond what it needs for one of 1 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from arbor_sft import tiny

from arbor_core.data.validator import FileCheck, check

CHECK_ROW = "arbor_core.data.rows:check_chat_row"
MODEL_CHECK = "arbor_trl.row_check:row_check"
SIZE = 20 << 20
RUNS = 5


def message(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def small() -> dict[str, Any]:
    """300 bytes."""
    answer = "Lima. It has been the capital since 1535, and ten million people live there today, a third of all."
    question = "What is the capital of Peru, and how large is it?"
    return {"messages": [message("system", "Be brief."), message("user", question), message("assistant", answer)]}


def talk() -> dict[str, Any]:
    """Twelve messages."""
    turns = [message("user", "Read this, then answer: why?\n" * 10), message("assistant", "For one thing: yes. " * 19)]
    return {"messages": turns * 6}


def quoted() -> dict[str, Any]:
    """The same with quotes in the texts."""
    turns = [message("user", 'He said: "why?", and left\n' * 10), message("assistant", 'She: "for one thing". ' * 15)]
    return {"messages": turns * 6}


def called() -> dict[str, Any]:
    """Tools, and calls of them."""
    properties = {
        name: {"type": "string", "description": "What it is for. " * 3} for name in ("city", "day", "hour", "unit")
    }
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": f"tool_{n}", "parameters": parameters}} for n in range(4)]
    function = {"name": "tool_1", "arguments": '{"city": "Lima", "day": "today"}'}
    turns = [
        message("user", "And the weather?"),
        message("assistant", "", tool_calls=[{"id": "call_1", "type": "function", "function": function}]),
        message("tool", "It is 18 degrees. " * 16, tool_call_id="call_1"),
        message("assistant", "It is 18."),
    ]
    return {"messages": turns * 3, "tools": tools}


def speed(row: dict[str, Any], folder: Path, model: Path | None = None) -> float:
    """Megabytes a second."""
    of_model = (MODEL_CHECK, str(model)) if model else (None, None)
    path = folder / "rows.jsonl"
    raw = json.dumps(row).encode() + b"\n"
    count = SIZE // len(raw)
    path.write_bytes(raw * count)
    best = float("inf")
    for _ in range(RUNS):
        start = time.process_time()
        report = check(FileCheck(CHECK_ROW, 10, str(path), None, *of_model))
        best = min(best, time.process_time() - start)
        assert report.rows == {"training_file": count}, report
    return round(len(raw) * count / best / 1e6, 1)


def memory(megabytes: int, folder: Path) -> float:
    """Megabytes that a validator needs at most."""
    path = folder / "rows.jsonl"
    raw = json.dumps(talk()).encode() + b"\n"
    path.write_bytes(raw * ((megabytes << 20) // len(raw)))
    files = msgspec.json.encode(FileCheck(CHECK_ROW, 10, str(path))).decode()
    script = (
        "import resource, sys; from arbor_core.data import validator; import msgspec; "
        "validator.check(msgspec.json.decode(sys.argv[1], type=validator.FileCheck)); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script, files], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.make(folder / "tiny")
        rows = {"small": small(), "talk": talk(), "quoted": quoted(), "called": called()}
        figures: dict[str, Any] = {
            "mb_per_second": {kind: speed(row, folder) for kind, row in rows.items()},
            "with_template": {kind: speed(row, folder, folder / "tiny") for kind, row in rows.items()},
            "row_bytes": {kind: len(json.dumps(row)) for kind, row in rows.items()},
            "memory_mb": round(memory(200, folder) - memory(1, folder), 1),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
