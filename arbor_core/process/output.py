"""What a module says that runs in another interpreter."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import msgspec

from .environment import clean_env

TRIES = 10


async def output_of(python: str, module: str, argument: Any) -> tuple[int | None, bytes, bytes]:
    """Run `python -m module <argument as JSON>`. It is killed if nobody waits any more; if somebody else kills it, it
    runs again.

    Returns:
        Exit status, output and errors.
    """
    for _ in range(TRIES):
        code, output, errors = await _once(python, module, argument)
        if code != -signal.SIGKILL:
            break
    return code, output, errors


async def _once(python: str, module: str, argument: Any) -> tuple[int | None, bytes, bytes]:
    process = await asyncio.create_subprocess_exec(
        python,
        "-m",
        module,
        msgspec.json.encode(argument).decode(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_env(),
    )
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    return process.returncode, output, errors


def last_words(code: int | None, errors: bytes) -> str:
    """Why a module failed: the last line that it wrote."""
    said = errors.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"it ended with status {code}"
