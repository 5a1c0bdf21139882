"""The server itself: how fast it starts, what it weighs, and what a gigabyte costs it.

Prints JSON on its last line. Aims: start to `/ready` under 1.5 s, `--help` under 1 s, idle under 120 MB, a 1 GB upload
adds under 50 MB and is not slower than half the speed of `cp` plus `sha256sum`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai

GIGABYTE = 1 << 30
SERVE = [sys.executable, "-m", "arbor_core", "serve"]


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("ARBOR_BENCH_DIR")) as folder:
        root = Path(folder)
        env = {**os.environ, "ARBOR_HOME": str(root / "home")}
        helping = min(seconds_of([*SERVE, "--help"], env) for _ in range(3))
        starts = [start_seconds(root / f"start-{n}", env) for n in range(3)]
        figures = {"help_seconds": helping, "ready_seconds": min(starts), **upload(root, env)}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def seconds_of(command: list[str], env: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def start(storage: Path, env: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([*SERVE, "port=0", f"storage={storage}"], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def start_seconds(storage: Path, env: dict[str, str]) -> float:
    """From the command to the first `/ready` that says yes."""
    began = time.monotonic()
    process, url = start(storage, env)
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/ready") as answer:
                    if answer.status == 200:
                        return time.monotonic() - began
            except urllib.error.URLError:
                continue
    finally:
        process.terminate()
        process.wait()


def memory_mb(pid: int, what: str) -> float:
    """`VmRSS` (now) or `VmHWM` (the most there ever was), in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {what} in /proc/{pid}/status")


def upload(root: Path, env: dict[str, str]) -> dict[str, float]:
    """A gigabyte through the stock client, against `cp` and `sha256sum` of the same file."""
    big = root / "big.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "x" * 900}]}).encode() + b"\n"
    with big.open("wb") as file:
        for _ in range(GIGABYTE // len(line)):
            file.write(line)
    process, url = start(root / "upload", env)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=600)
        with urllib.request.urlopen(f"{url}/health"):
            idle = memory_mb(process.pid, "VmRSS")
        began = time.monotonic()
        with big.open("rb") as file:
            made = client.files.create(file=file, purpose="fine-tune")
        sent = time.monotonic() - began
        peak = memory_mb(process.pid, "VmHWM")
    finally:
        process.terminate()
        process.wait()
    if made.bytes != big.stat().st_size:
        raise RuntimeError(f"the server has {made.bytes} bytes of {big.stat().st_size}")
    copying = seconds_of(["cp", str(big), str(root / "copy")], env)
    plain = copying + seconds_of(["sha256sum", str(big)], env)  # neither waits for the disk; the server does
    return {
        "idle_mb": idle,
        "upload_added_mb": peak - idle,
        "upload_seconds": sent,
        "cp_and_sha256sum_seconds": plain,
        "upload_speed_ratio": plain / sent,
    }


if __name__ == "__main__":
    main()
