"""Ranks without torch: `python -m arbor_mock.ranks NICE RANKS COMMAND...` is all that a launcher has to be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence


def main(nice: int, ranks: int, command: Sequence[str]) -> int:
    """Run a command in so many processes; 0 when all have ended well, else the first status that is not."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.nice(nice)
    living: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in range(ranks):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            process = subprocess.Popen(command, env=env)
            living[process.pid] = process
        while living:
            pid, status = os.wait()
            living.pop(pid, None)
            if status:
                return 1
        return 0
    finally:
        for process in living.values():
            process.terminate()
        for process in living.values():
            process.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
