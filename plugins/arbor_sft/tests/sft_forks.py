"""Forks attempts for `sft_jobs.Fork`: reads `start FOLDER` and `poll PID`, answers each with one line."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

from arbor_sft import arbor_trainers

from arbor_core.worker.main import main


def start(folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = main(folder)
    finally:
        sys.stdout.flush()
        os._exit(code)


def poll(pid: int) -> str:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return str(os.waitstatus_to_exitcode(status)) if ended else "running"


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for module in arbor_trainers()["sft"].preload:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        verb, what = line.split(maxsplit=1)
        print(start(Path(what.strip())) if verb == "start" else poll(int(what)), file=answers, flush=True)
