"""`arbor doctor`: does every trainer's warm start work here?"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from arbor_core import plugins
from arbor_core.builtin.executor import ForkServerError, ForkServerKey, LocalExecutor
from arbor_core.types import ExecutorSettings, Trainer


def examine() -> int:
    """Try each set of libraries in a fork server; returns 1 if one has to start cold, or a plugin does not load."""
    loaded = plugins.load()
    for reason in loaded.broken.values():
        print(f"broken   {reason}")
    trainers = loaded.all("trainers")
    results = [asyncio.run(warm(name, trainer)) for name, trainer in trainers.items() if trainer.preload]
    for name, trainer in trainers.items():
        if not trainer.preload:
            print(f"ok       trainer {name}: has nothing to preload")
    return 0 if all(results) and not loaded.broken else 1


async def warm(name: str, trainer: Trainer) -> bool:
    """Start the trainer's fork server once and say how it went."""
    with tempfile.TemporaryDirectory() as folder:
        executor = LocalExecutor(ExecutorSettings("warm", Path(folder)))
        key = ForkServerKey(trainer.python or sys.executable, trainer.preload, trainer.prove)
        began = time.monotonic()
        try:
            await executor.fork_server(key)
        except ForkServerError as error:
            print(f"cold     trainer {name}: {error}")
            return False
        finally:
            await executor.close()
    print(f"ok       trainer {name}: warm after {time.monotonic() - began:.1f} s")
    return True
