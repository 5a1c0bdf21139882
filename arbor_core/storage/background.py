"""Requests go first: what the server does by itself, above all its dispatcher, works in the background.

Who works there changes the database behind those that clients wait for (`database.py`), and reads and writes files on
threads of its own, so that no request waits for a free one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 8
"""They wait for the disk most of the time."""
_threads: ContextVar[ThreadPoolExecutor | None] = ContextVar("threads", default=None)


@asynccontextmanager
async def in_background() -> AsyncIterator[None]:
    """What this task does inside the block, and the tasks that it starts there, is nothing that a client waits for."""
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="background")
    token = _threads.set(threads)
    try:
        yield
    finally:
        _threads.reset(token)
        await asyncio.to_thread(threads.shutdown)


def is_background() -> bool:
    """Whether the current task works in the background."""
    return _threads.get() is not None


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`; on a thread of the background's own, if the current task works there."""
    call = partial(copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_threads.get(), call)
